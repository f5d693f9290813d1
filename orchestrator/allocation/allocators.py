"""The allocators: from shapes, weights, or the scores of the dense model to a sparsity for each linear."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from billhook.layerworkers.errors import InputError
from billhook.layerworkers.observing import ScoreFacts
from billhook.orchestrator.allocation.budget import Matrix
from billhook.orchestrator.allocation.magnitudes import Histogram

UNIFORM = "uniform"


@dataclass(frozen=True)
class Evidence:
    """What an allocator may look at; only what is called is found out."""

    matrices: Sequence[Matrix]
    histograms: Callable[[], Sequence[Histogram]]
    """Returns the magnitudes of each matrix: all weights are read."""
    scores: Callable[[float], Sequence[Sequence[ScoreFacts]]]
    """Returns Wanda's scores in the dense model, of the matrices of each block, given the multiple of the block's mean
    above which they are counted: the calibration samples pass the model."""


@dataclass(frozen=True)
class Allocator:
    """One row of the table of allocators."""

    name: str
    source: str
    """Paper and section."""
    summary: str
    needs: str
    """``shapes``, ``weights``, or ``tokens``: calibration samples."""
    options: type[Any]
    """A frozen dataclass of the allocator's own options, each a number with a default."""
    sparsities: Callable[[Evidence, float, Any], list[float]]
    """``sparsities(evidence, sparsity, options)``: of each matrix; they need not add up."""


@dataclass(frozen=True)
class NoOptions:
    """There are none."""


@dataclass(frozen=True)
class OwlOptions:
    """Options of OWL; the defaults are those of the authors for Llama."""

    outlier: float = 5.0
    """A score is an outlier above so many times the mean of its block; above 0."""
    spread: float = 0.08
    """Half the distance of the sparsest block from the densest; between 0 and 0.5."""

    def __post_init__(self) -> None:
        if not 0 < self.outlier < float("inf"):
            raise InputError(f"outlier={self.outlier}: expected a positive number, for example 5")
        _check_spread(self.spread)


@dataclass(frozen=True)
class DlpOptions:
    """Options of DLP; the default is the authors'."""

    spread: float = 0.15
    """Half the distance of the sparsest block from the densest; between 0 and 0.5."""

    def __post_init__(self) -> None:
        _check_spread(self.spread)


def _check_spread(spread: float) -> None:
    if not 0 <= spread <= 0.5:
        raise InputError(f"spread={spread}: expected a number between 0 and 0.5, for example 0.08")


def uniform(evidence: Evidence, sparsity: float, options: NoOptions) -> list[float]:
    """Return the same sparsity for all."""
    return [sparsity] * len(evidence.matrices)


def erk(evidence: Evidence, sparsity: float, options: NoOptions) -> list[float]:
    """Return sparsities by ERK: densities go with ``(R + C) / (R C)``; those that would exceed 1 are 1."""
    matrices = evidence.matrices
    sizes = np.array([matrix.size for matrix in matrices], dtype=np.float64)
    raw = np.array([(matrix.rows + matrix.columns) / matrix.size for matrix in matrices])
    dense = np.zeros(len(matrices), dtype=bool)
    budget = (1 - sparsity) * sizes.sum()
    while True:
        scale = (budget - sizes[dense].sum()) / (raw * sizes)[~dense].sum()
        above = ~dense & (scale * raw > 1)
        if not above.any():
            return [0.0 if full else float(1 - scale * share) for full, share in zip(dense, raw, strict=True)]
        dense |= above


def global_magnitude(evidence: Evidence, sparsity: float, options: NoOptions) -> list[float]:
    """Return the shares of each matrix that lie below one threshold of ``|W|`` for all of them."""
    found = evidence.histograms()
    return _below([each.counts for each in found], [each.squares for each in found], sparsity)


def lamp(evidence: Evidence, sparsity: float, options: NoOptions) -> list[float]:
    """Return the shares below one threshold of the LAMP score ``w_u^2 / sum of w_v^2 over all |w_v| >= |w_u|``.

    Entries of a matrix that are alike in magnitude have the score of the first of them.
    """
    found = evidence.histograms()
    scores = []
    for each in found:
        tails = np.cumsum((each.counts * each.squares)[::-1])[::-1]
        scores.append(np.divide(each.squares, tails, out=np.zeros_like(tails), where=tails > 0))
    return _below([each.counts for each in found], scores, sparsity)


def owl(evidence: Evidence, sparsity: float, options: OwlOptions) -> list[float]:
    """Return sparsities by OWL: blocks in which more scores are outliers stay denser."""
    blocks = [block for block in evidence.scores(options.outlier) if block]
    shares = [sum(each.above for each in block) / max(1, sum(each.entries for each in block)) for block in blocks]
    return _of_blocks(blocks, evidence, spread_out(shares, sparsity, options.spread))


def dlp(evidence: Evidence, sparsity: float, options: DlpOptions) -> list[float]:
    """Return sparsities by DLP: blocks whose mean score is a larger part of the sum over all blocks are sparser.

    The authors' code takes the mean for unstructured patterns; their paper says the median.
    """
    blocks = [block for block in evidence.scores(1.0) if block]
    means = [math.fsum(each.total for each in block) / max(1, sum(each.entries for each in block)) for block in blocks]
    whole = math.fsum(means) or 1.0
    return _of_blocks(blocks, evidence, spread_out([1 - mean / whole for mean in means], sparsity, options.spread))


def spread_out(scores: Sequence[float], sparsity: float, spread: float) -> list[float]:
    """Return sparsities of blocks whose densities rise with the scores: from lowest to highest by twice ``spread``.

    ``d = 2 spread (D - min D) / (max D - min D)``; the density is ``d - mean d + 1 - sparsity`` (OWL, section 3.3).
    """
    low, high = min(scores), max(scores)
    if high == low:
        return [sparsity] * len(scores)
    raised = [2 * spread * (score - low) / (high - low) for score in scores]
    mean = math.fsum(raised) / len(raised)
    return [sparsity - each + mean for each in raised]


def _of_blocks(blocks: Sequence[Sequence[ScoreFacts]], evidence: Evidence, sparsities: Sequence[float]) -> list[float]:
    """Return each matrix's sparsity, given those of the blocks."""
    by_name = {each.name: sparsity for block, sparsity in zip(blocks, sparsities, strict=True) for each in block}
    return [by_name[matrix.name] for matrix in evidence.matrices]


def _below(counts: Sequence[np.ndarray], scores: Sequence[np.ndarray], sparsity: float) -> list[float]:
    """Return each matrix's share of counts that belong to the smallest scores, of which there are as many as asked.

    counts, scores: of each matrix, by its levels. What the last score taken has too many is divided by their numbers.
    """
    all_counts, all_scores = np.concatenate(counts), np.concatenate(scores)
    order = np.argsort(all_scores, kind="stable")
    running = np.cumsum(all_counts[order])
    wanted = int(sparsity * running[-1])
    threshold = all_scores[order[np.searchsorted(running, wanted)]] if wanted else -1.0
    below = np.array([float(n[score < threshold].sum()) for n, score in zip(counts, scores, strict=True)])
    tied = np.array([float(n[score == threshold].sum()) for n, score in zip(counts, scores, strict=True)])
    if tied.sum():
        below += tied * ((wanted - below.sum()) / tied.sum())
    return [float(share / n.sum()) for share, n in zip(below, counts, strict=True)]


ALLOCATORS: dict[str, Allocator] = {
    each.name: each
    for each in (
        Allocator(UNIFORM, "", "the same for every linear", "shapes", NoOptions, uniform),
        Allocator(
            "erk",
            "Evci et al., RigL, ICML 2020 (arXiv 1911.11134), section 3; Mocanu et al., SET, 2018",
            "small linears stay denser, by the sum of their sides over the product",
            "shapes",
            NoOptions,
            erk,
        ),
        Allocator(
            "global-magnitude",
            "Han et al., NeurIPS 2015 (arXiv 1506.02626)",
            "one threshold of |W| for all linears",
            "weights",
            NoOptions,
            global_magnitude,
        ),
        Allocator(
            "lamp",
            "Lee et al., Layer-adaptive Sparsity for Magnitude-based Pruning, ICLR 2021 (arXiv 2010.07611), section 3",
            "one threshold of the magnitude over that of all larger ones of the linear",
            "weights",
            NoOptions,
            lamp,
        ),
        Allocator(
            "owl",
            "Yin et al., Outlier Weighed Layerwise Sparsity, ICML 2024 (arXiv 2310.05175), section 3.3",
            "blocks with more outliers among their Wanda scores stay denser",
            "tokens",
            OwlOptions,
            owl,
        ),
        Allocator(
            "dlp",
            "Dynamic Layerwise Pruning, ICML 2025, as its published code has it",
            "blocks with larger Wanda scores become sparser",
            "tokens",
            DlpOptions,
            dlp,
        ),
    )
}
