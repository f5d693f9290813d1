"""Mosaic's projection ratios: OWL's, for each projection of a block by itself."""

from __future__ import annotations

import re
from dataclasses import dataclass

from billhook.layerworkers.errors import OptionError
from billhook.layerworkers.observing import ScoreFacts
from billhook.orchestrator.allocation.contract import Evidence, check_spread, spread_out


@dataclass(frozen=True)
class MosaicOptions:
    """Options of Mosaic; the defaults are those of the authors."""

    outlier: float = 5.0
    """A score is an outlier above so many times the mean of its linear; above 0."""
    spread: float = 0.08
    """Half the distance of the sparsest linear of a kind from the densest; between 0 and 0.5."""

    def __post_init__(self) -> None:
        if not 0 < self.outlier < float("inf"):
            raise OptionError(f"outlier={self.outlier}: expected a positive number, for example 5")
        check_spread(self.spread)


def mosaic(evidence: Evidence, sparsity: float, options: MosaicOptions) -> list[float]:
    """Return sparsities by OWL's map, over the blocks, of the outliers of one kind of linear at a time.

    The experts of a block are one linear here. In the authors' code the linears of a block differ by a constant only;
    this is what their paper describes.
    """
    kinds: dict[str, dict[int, list[ScoreFacts]]] = {}
    for number, block in enumerate(evidence.scores(options.outlier)):
        for each in block:
            kinds.setdefault(_kind(each.name), {}).setdefault(number, []).append(each)
    found: dict[str, float] = {}
    for blocks in kinds.values():
        shares = [
            sum(each.above_own for each in linears) / max(1, sum(each.entries for each in linears))
            for linears in blocks.values()
        ]
        for linears, own in zip(blocks.values(), spread_out(shares, sparsity, options.spread), strict=True):
            found |= {each.name: own for each in linears}
    return [found[matrix.name] for matrix in evidence.matrices]


def _kind(name: str) -> str:
    """Return what linears of all blocks, and experts, have in common whose names differ in numbers only."""
    return re.sub(r"(^|\.)\d+(?=\.)", r"\1*", name)
