"""How often each magnitude occurs in a weight, as its bfloat16 value: exact for weights in bfloat16."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from billhook.layerworkers.shards import TensorEntry
from billhook.orchestrator.inspection import pieces

LEVELS = 1 << 15
"""Magnitudes that bfloat16 can tell apart, infinite ones included."""


@dataclass(frozen=True, eq=False)
class Histogram:
    """A matrix's entries by magnitude, as far as there are any."""

    squares: np.ndarray
    """[L] float64: squared magnitudes, ascending."""
    counts: np.ndarray
    """[L] int64: entries of each; above 0."""


def histogram(entry: TensorEntry) -> Histogram:
    """Count the magnitudes of a tensor, a piece at a time."""
    counts = np.zeros(LEVELS, dtype=np.int64)
    for piece in pieces(entry):
        levels = piece.bfloat16().view(torch.int16) & (LEVELS - 1)
        counts += np.bincount(levels.numpy().ravel(), minlength=LEVELS)
    found = np.flatnonzero(counts)
    magnitudes = torch.from_numpy(found.astype(np.int16)).view(torch.bfloat16)
    return Histogram(magnitudes.double().square().numpy(), counts[found])
