"""Triangles of square matrices as they travel between workers: their entries row after row, and nothing else.

Legend: R rows of a band, C rows and columns of the matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from billhook.kernels.gram import mirror_lower_
from billhook.layerworkers.collective import Collective, Load, broadcast_bands
from billhook.layerworkers.scratch import bands

Triangle = Callable[[int], slice]
"""Returns the columns of a row, given its number, that lie in the triangle."""

Packed = np.ndarray[Any, Any]
"""Float32, flat."""


def lower(row: int) -> slice:
    """Return the columns up to the diagonal."""
    return slice(row + 1)


def upper(row: int) -> slice:
    """Return the columns from the diagonal on."""
    return slice(row, None)


def pack(band_RC: Tensor, first_row: int, triangle: Triangle) -> Packed:
    """Return what a band of rows, [R, C] float32 on any device, has in the triangle."""
    return np.concatenate([row[triangle(first_row + number)] for number, row in enumerate(band_RC.cpu().numpy())])


def unpack(packed: Packed, shape: tuple[int, ...], first_row: int, triangle: Triangle) -> Tensor:
    """Return the band of ``shape`` [R, C] that was packed, on the CPU, with zeros outside the triangle."""
    band_RC = np.zeros(shape, dtype=np.float32)
    taken = 0
    for number, row in enumerate(band_RC):
        own = row[triangle(first_row + number)]
        own[:] = packed[taken : taken + own.size]
        taken += own.size
    return torch.from_numpy(band_RC)


def triangle_load(size: int) -> Load:
    """Return what each receiver is sent of an upper triangle with ``size`` rows, or about that of a lower one."""
    return Load((tuple(band_bytes(size - stop, size - start) for start, stop in bands((size, size))),))


def band_bytes(start: int, stop: int) -> int:
    """Return the bytes of some rows of a lower triangle."""
    return 2 * (stop * (stop + 1) - start * (start + 1))


def broadcast_upper_(group: Collective, root: int, a_CC: Tensor) -> None:
    """Overwrite ``a_CC`` by the root's, which is zero below the diagonal."""
    _broadcast_(group, root, a_CC, upper)


def broadcast_symmetric_(group: Collective, root: int, a_CC: Tensor) -> None:
    """Overwrite ``a_CC`` by the root's, which is symmetric to the last bit."""
    _broadcast_(group, root, a_CC, lower)
    if group.rank != root:
        mirror_lower_(a_CC)


def _broadcast_(group: Collective, root: int, a_CC: Tensor, triangle: Triangle) -> None:
    spans = list(bands(a_CC.shape))

    def message(number: int) -> Packed:
        start, stop = spans[number]
        return pack(a_CC[start:stop], start, triangle)

    def take(number: int, packed: Packed) -> None:
        start, stop = spans[number]
        a_CC[start:stop] = unpack(packed, (stop - start, a_CC.shape[1]), start, triangle)

    broadcast_bands(group, root, len(spans), message, take)
