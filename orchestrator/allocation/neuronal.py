"""NeuronAl: shares of blocks, then of the rows of each linear, of several those that change activations least."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from billhook.layerworkers.candidates import Deviation, Prune, PruneRows, RowScores
from billhook.layerworkers.errors import OptionError
from billhook.orchestrator.allocation.contract import Candidate, Evidence, ForRows, check_samples

SLOPES = (0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.09, 0.10, 0.12, 0.15, 0.20, 0.25)
"""Half the distances of the last block's sparsity from the first one's, or of rows' from each other, that are tried."""

STEEPEST_BELOW = 0.8
"""Sparsity from which on the last of them is left out for blocks."""

BOUNDS = (0.01, 0.99)
"""Of a block's sparsity."""


@dataclass(frozen=True)
class NeuronAlOptions:
    """Options of NeuronAl; the defaults are the authors'."""

    samples: int = 8
    """Calibration samples that pass the candidates, the first ones; all, where there are fewer."""
    step: str = "both"
    """``both``: blocks, then rows, where the method compares the entries of each row by themselves; ``block``."""

    def __post_init__(self) -> None:
        check_samples(self.samples)
        if self.step not in ("both", "block"):
            raise OptionError(f"step={self.step}: expected both or block")


def slope(sparsity: float, half: float, blocks: int) -> list[float]:
    """Return sparsities of blocks ``s_i = s + half (2 i / (L - 1) - 1)``, clipped to :data:`BOUNDS`."""
    if blocks == 1:
        return [sparsity]
    return [min(max(sparsity + half * (2 * i / (blocks - 1) - 1), BOUNDS[0]), BOUNDS[1]) for i in range(blocks)]


def neuronal(evidence: Evidence, sparsity: float, options: NeuronAlOptions) -> list[float] | ForRows:
    """Return the sparsities of that slope over the blocks whose sum of deviations is smallest: of equal ones the first.

    Every block of every candidate is pruned by Wanda's scores, fed with what the candidate's blocks before it make of
    the samples. In the second step the rows of linears are spread in the same ways, and not at all, around the slope.
    """
    blocks = evidence.pruned_blocks
    if sparsity == 0:
        return [sparsity] * len(evidence.matrices)
    tried = [half for half in SLOPES if sparsity < STEEPEST_BELOW or half < SLOPES[-1]]
    slopes = [slope(sparsity, half, len(blocks)) for half in tried]
    candidates = [{block: Prune(own) for block, own in zip(blocks, each, strict=True)} for each in slopes]
    found = evidence.deviations(candidates, options.samples)
    best = _smallest(found)
    of_block = dict(zip(blocks, slopes[best], strict=True))
    sparsities = [of_block[block] for block in evidence.blocks]
    scores = row_scores(evidence, found[best]) if options.step == "both" else {}
    if not scores:
        return sparsities
    of_rows = {block: RowScores(own) for block, own in scores.items()}

    def spread_by(spread: float) -> Candidate:
        return {
            block: PruneRows(own, spread, of_rows[block]) if block in of_rows else Prune(own)
            for block, own in of_block.items()
        }

    spreads = [0.0, *SLOPES]
    chosen = _smallest(evidence.deviations([candidates[best], *map(spread_by, SLOPES)], options.samples))
    if spreads[chosen] == 0:
        return sparsities
    return ForRows(sparsities, {name: own for each in scores.values() for name, own in each.items()}, spreads[chosen])


def row_scores(evidence: Evidence, deviations: Sequence[Deviation]) -> dict[int, Mapping[str, np.ndarray]]:
    """Return by block and linear how much the norms of what its rows give shrank when the block was pruned: [R].

    They are seen where the rows show in a later input of the block. Linears whose rows show in none, those of the
    model's last block, and those that are not selected row by row, have none, and neither have those whose rows are all
    alike.

    deviations: of each block.
    """
    scores: dict[int, dict[str, np.ndarray]] = {}
    for matrix, block, outlet in zip(evidence.matrices, evidence.blocks, evidence.outlets, strict=True):
        if outlet is None or matrix.step != matrix.rows or block == len(deviations) - 1:
            continue
        own = outlet.rows(deviations[block].shrinkage[outlet.name], matrix.rows)
        if 0 < np.ptp(own) < math.inf:
            scores.setdefault(block, {})[matrix.name] = own
    return dict(scores)


def _smallest(candidates: Sequence[Sequence[Deviation]]) -> int:
    """Return which candidate deviates least over its blocks: of equal ones the first."""
    totals = [math.fsum(each.distance for each in own) for own in candidates]
    return totals.index(min(totals))
