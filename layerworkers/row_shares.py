"""How the rows of a linear share what it loses: each loses a number of its own, and these add up.

Legend: R rows (outputs), C columns (inputs).
"""

from __future__ import annotations

import math

import numpy as np

from billhook.layerworkers.water_filling import filled

BOUNDS = (0.01, 0.99)
"""Of the share of a row's entries that is removed, as far as they leave room for what the linear loses."""


def row_counts(score_R: np.ndarray, columns: int, removed: int, spread: float) -> np.ndarray:
    """Return how many entries each row loses, [R] int64, ``removed`` in all: rows with larger scores lose fewer.

    With ``d = 2 spread (a - min a) / (max a - min a)`` of the scores a, a row loses the share ``s + mean d - d``, s
    being that of the linear (Cunegatti et al., NeuronAl, 2025, its code), clipped to :data:`BOUNDS`. Where that changes
    the sum, or shares are no whole numbers of entries, all are shifted by the same amount until the sum is right; of
    the parts of an entry that are cut off the largest are rounded up, by their order where they are equal.
    """
    rows = len(score_R)
    raised_R = score_R.astype(np.float64) - float(score_R.min())
    highest = float(raised_R.max())
    densities_R = raised_R * (2 * spread / highest if highest > 0 else 0.0)
    shares_R = removed / (rows * columns) + densities_R.mean() - densities_R
    least = min(math.ceil(BOUNDS[0] * columns), removed // rows)
    room = max(int(BOUNDS[1] * columns), -(-removed // rows)) - least
    above = removed - rows * least
    counts_R = filled(shares_R - least / columns, np.full(rows, columns), np.full(rows, room), above)
    whole_R: np.ndarray = np.floor(counts_R).astype(np.int64)
    by_remainder = np.argsort(whole_R - counts_R, kind="stable")
    whole_R[by_remainder[: above - int(whole_R.sum())]] += 1
    whole_R += least
    return whole_R
