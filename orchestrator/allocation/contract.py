"""What an allocator is, what it may look at, and what several of them do."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from billhook.layerworkers.besa import Learning
from billhook.layerworkers.candidates import Change, Deviation
from billhook.layerworkers.errors import OptionError
from billhook.layerworkers.observing import ScoreFacts
from billhook.orchestrator.allocation.budget import Matrix
from billhook.orchestrator.allocation.magnitudes import Histogram
from billhook.orchestrator.allocation.outlets import Outlet

Candidate = Mapping[int, Change]
"""What is done to some blocks of a model, by their indices; the others stay dense."""


@dataclass(frozen=True)
class Evidence:
    """What an allocator may look at; only what is called is found out."""

    matrices: Sequence[Matrix]
    histograms: Callable[[], Sequence[Histogram]]
    """Returns the magnitudes of each matrix: all weights are read."""
    spectra: Callable[[], Sequence[Sequence[np.ndarray]]]
    """Returns the squared singular values of the matrices of each block, ascending: all weights are read."""
    scores: Callable[[float], Sequence[Sequence[ScoreFacts]]]
    """Returns Wanda's scores in the dense model, of the matrices of each block, given the multiple of the block's mean
    above which they are counted: the calibration samples pass the model."""
    blocks: Sequence[int]
    """Index of the block of each matrix."""
    deviations: Callable[[Sequence[Candidate], int], Sequence[Sequence[Deviation]]]
    """Returns how each block of each candidate is from the dense block on the same input: so many calibration samples
    pass all candidates together."""
    losses: Callable[[Sequence[Candidate], int], Sequence[float]]
    """Returns each candidate's mean cross-entropy in nats per token, on so many of the calibration samples."""
    learnt: Callable[[Learning, int], Sequence[float]]
    """Returns the sparsity of each matrix, learnt as so many of the calibration samples pass the model block by block,
    see :func:`billhook.layerworkers.besa.learn_block`."""
    outlets: Sequence[Outlet | None] = ()
    """Where the rows of each matrix show; None where that is not known."""

    @property
    def pruned_blocks(self) -> list[int]:
        """The indices of the blocks of which something is pruned, ascending."""
        return sorted(set(self.blocks))


@dataclass(frozen=True)
class ForRows:
    """Sparsities of matrices, and how the rows of some of them share what their matrix loses."""

    sparsities: Sequence[float]
    """Of each matrix."""
    scores: Mapping[str, np.ndarray]
    """[R] by the matrix's name; the rows of the others lose the same."""
    spread: float
    """See :func:`billhook.layerworkers.row_shares.row_counts`."""


@dataclass(frozen=True)
class Allocator:
    """One row of the table of allocators."""

    name: str
    source: str
    """Paper and section."""
    summary: str
    needs: str
    """``shapes``, ``weights``, ``tokens`` (calibration samples pass the dense model), ``candidates`` (they pass changed
    ones), or ``gradients`` (they pass blocks forward and backward)."""
    options: type[Any]
    """A frozen dataclass of the allocator's own options, each a number or string with a default."""
    sparsities: Callable[[Evidence, float, Any], list[float] | ForRows]
    """``sparsities(evidence, sparsity, options)``: of each matrix, and maybe of its rows; they need not add up."""

    @property
    def runs_samples(self) -> bool:
        """Whether it looks at calibration samples."""
        return self.needs in ("tokens", "candidates", "gradients")


@dataclass(frozen=True)
class NoOptions:
    """There are none."""


def check_spread(spread: float) -> None:
    """Check the option ``spread`` of allocators that :func:`spread_out` densities."""
    if not 0 <= spread <= 0.5:
        raise OptionError(f"spread={spread}: expected a number between 0 and 0.5, for example 0.08")


def check_samples(samples: int) -> None:
    """Check the option ``samples`` of allocators that look at some of them only."""
    if samples < 1:
        raise OptionError(f"samples={samples}: expected at least 1, for example 8")


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


def of_blocks(blocks: Sequence[Sequence[ScoreFacts]], evidence: Evidence, sparsities: Sequence[float]) -> list[float]:
    """Return each matrix's sparsity, given those of the blocks."""
    by_name = {each.name: sparsity for block, sparsity in zip(blocks, sparsities, strict=True) for each in block}
    return [by_name[matrix.name] for matrix in evidence.matrices]


def below(counts: Sequence[np.ndarray], scores: Sequence[np.ndarray], sparsity: float) -> list[float]:
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
