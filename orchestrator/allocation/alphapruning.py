"""AlphaPruning: blocks whose weights have heavier-tailed spectra stay denser."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from billhook.layerworkers.errors import OptionError
from billhook.orchestrator.allocation.contract import Evidence

BINS = 100
"""Of the histogram of a spectrum's logarithms: near the lower end of the fullest the tail begins."""

NEAR = (0.95, 1.5)
"""What is near it, in multiples."""


@dataclass(frozen=True)
class AlphaPruningOptions:
    """Options of AlphaPruning; the default is the authors' for most models."""

    spread: float = 0.3
    """How much sparser than the asked sparsity the sparsest block is, and denser the densest, relative to it and before
    all are scaled to the budget; between 0 and 1."""

    def __post_init__(self) -> None:
        if not 0 <= self.spread <= 1:
            raise OptionError(f"spread={self.spread}: expected a number between 0 and 1, for example 0.3")


def alphapruning(evidence: Evidence, sparsity: float, options: AlphaPruningOptions) -> list[float]:
    """Return sparsities by the mean tail exponent of each block's linears; see :func:`from_exponents`."""
    blocks = [block for block in evidence.spectra() if block]
    exponents = [_mean([tail_exponent(spectrum) for spectrum in block]) for block in blocks]
    ends = np.cumsum([len(block) for block in blocks])
    entries = [
        float(sum(matrix.size for matrix in evidence.matrices[end - len(block) : end]))
        for block, end in zip(blocks, ends, strict=True)
    ]
    shares = from_exponents(exponents, entries, sparsity, options.spread)
    return [share for block, share in zip(blocks, shares, strict=True) for _ in block]


def tail_exponent(spectrum: np.ndarray) -> float:
    """Return Hill's estimate of a spectrum's power law ``p(x) ~ x^-alpha`` in its tail; NaN where there is none.

    spectrum: [N] float64, squared singular values, ascending. ``alpha = 1 + n / sum ln(x_i / x_min)`` over the n values
    from ``x_min`` on. Of the values near the peak of the histogram of ``ln x``, that one is ``x_min`` whose tail is
    nearest to its power law by Kolmogorov's and Smirnov's distance; the authors' code means to do so, but compares one
    end of what is near with the logarithm of the other. What rounding has left of zeros is no value.
    """
    if not len(spectrum) or spectrum[-1] <= 0:
        return float("nan")
    logarithms = np.log(spectrum[spectrum > spectrum[-1] * len(spectrum) * np.finfo(np.float64).eps])
    counts, edges = np.histogram(logarithms, BINS)
    peak = edges[np.argmax(counts)]
    first, last = np.searchsorted(logarithms, peak + np.log(NEAR))
    exponents = [_power_law(logarithms[begin:]) for begin in range(first, max(last, first + 1))]
    return min(exponents, key=lambda found: found[1])[0]


def _power_law(tail: np.ndarray) -> tuple[float, float]:
    """Return the exponent of a tail, given ascending logarithms, and its distance from the power law."""
    raised = tail - tail[0]
    if not raised.sum() > 0:
        return float("nan"), float("inf")
    exponent = 1 + len(tail) / raised.sum()
    below = np.arange(len(tail)) / len(tail)
    return float(exponent), float(np.abs(1 - np.exp((1 - exponent) * raised) - below).max())


def from_exponents(exponents: list[float], entries: list[float], sparsity: float, spread: float) -> list[float]:
    """Return blocks' sparsities: ``c s r_b`` with ``r_b = 1 - e + 2 e (alpha_b - min) / (max - min)``, e the spread.

    c makes the mean, weighted by entries, the sparsity that is asked. A block without an exponent (NaN) has the mean
    of the others.
    """
    known = np.array(exponents)
    known = np.where(np.isnan(known), _mean(exponents), known)
    low, high = known.min(), known.max()
    if not high > low:
        return [sparsity] * len(exponents)
    raised = 1 - spread + 2 * spread * (known - low) / (high - low)
    weights = np.array(entries)
    scale = weights.sum() / (weights * raised).sum()
    return [float(share) for share in sparsity * scale * raised]


def _mean(values: list[float]) -> float:
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")
