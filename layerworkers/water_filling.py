"""Shares that are shifted until they add up: what one cannot take, the others share (water-filling)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Numbers = Sequence[float] | np.ndarray

HALVINGS = 200
"""Of the interval that the common shift lies in: more than float64 can tell apart."""


def filled(shares: Numbers, sizes: Numbers, most: Numbers, total: float) -> np.ndarray:
    """Return counts [N] float64 near ``shares * sizes`` that add up to ``total``, or to as much of it as there is.

    All shares are shifted by the same amount, and each count is clipped to 0 and ``most``.
    """
    wanted, all_of, limit = (np.asarray(each, dtype=np.float64) for each in (shares, sizes, most))
    low, high = -1.0 - float(wanted.max()), 1.0 - float(wanted.min())
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if _clipped(wanted + middle, all_of, limit).sum() < total:
            low = middle
        else:
            high = middle
    return _clipped(wanted + high, all_of, limit)


def _clipped(shares: np.ndarray, sizes: np.ndarray, most: np.ndarray) -> np.ndarray:
    counts: np.ndarray = np.clip(shares * sizes, 0.0, most)
    return counts
