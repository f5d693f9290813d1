"""How often each magnitude occurs in a weight: exact where a weight has 16 bits, from its upper 16 bits else."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from billhook.layerworkers.shards import TensorEntry
from billhook.orchestrator.inspection import pieces

LEVELS = 1 << 15
"""Magnitudes that bfloat16 can tell apart, infinite ones included."""


@dataclass(frozen=True, eq=False)
class Histogram:
    """A matrix's entries by magnitude."""

    counts: np.ndarray
    """[LEVELS] int64: entries whose magnitude, in bfloat16, has these bits."""

    @cached_property
    def squares(self) -> np.ndarray:
        """The squared magnitudes, [LEVELS] float64."""
        levels = torch.arange(LEVELS, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
        squares: np.ndarray = np.nan_to_num(levels.double().square().numpy(), nan=0.0, posinf=0.0)
        return squares


def histogram(entry: TensorEntry) -> Histogram:
    """Count the magnitudes of a tensor, a piece at a time."""
    counts = np.zeros(LEVELS, dtype=np.int64)
    for piece in pieces(entry):
        counts += np.bincount(_levels(piece).numpy().ravel(), minlength=LEVELS)
    return Histogram(counts)


def _levels(piece: Tensor) -> Tensor:
    return piece.bfloat16().view(torch.int16) & (LEVELS - 1)
