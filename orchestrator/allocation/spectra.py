"""The squared singular values of a weight."""

from __future__ import annotations

import numpy as np
import torch

from billhook.layerworkers.shards import TensorEntry
from billhook.layerworkers.transfer import check_finite
from billhook.orchestrator.inspection import pieces

BAND = 1024
"""Rows, or columns, that are in float64 at once."""


def spectrum(entry: TensorEntry) -> np.ndarray:
    """Return the squared singular values of a weight, ascending, [min(R, C)] float64.

    They are the eigenvalues of the product of its smaller side with itself, in float64, by one thread: so they do not
    depend on how many there are. See :func:`spectrum_bytes`.

    Raises:
        InputError: when a weight is NaN or infinite.
    """
    weight = torch.cat(list(pieces(entry)))
    check_finite(entry, weight)
    tall = weight if weight.shape[0] >= weight.shape[1] else weight.T
    gram = torch.zeros(tall.shape[1], tall.shape[1], dtype=torch.float64)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for start in range(0, tall.shape[0], BAND):
            band = tall[start : start + BAND].double()
            gram.addmm_(band.T, band)
        values: np.ndarray = torch.linalg.eigvalsh(gram).clamp_(min=0).numpy()
    finally:
        torch.set_num_threads(threads)
    return values


def spectrum_bytes(entry: TensorEntry) -> int:
    """Return the memory that :func:`spectrum` takes: the weight, twice while it is read; the product and its copies."""
    short = min(entry.shape[-2:])
    return 2 * entry.size_bytes + 8 * (3 * short * short + BAND * short)
