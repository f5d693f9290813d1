"""Statistics that were collected once, on disk: what a Gram method needs of an input, for any number of solves.

Of each input the lower triangle of the Gram matrix, row after row, and behind it the moments: one flat float32 tensor.

Legend: C input channels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from billhook.layerworkers.scratch import bands
from billhook.layerworkers.shards import Read, TensorEntry, read_rows
from billhook.layerworkers.statistics import GRAM_AND_MOMENTS, Statistic
from billhook.layerworkers.triangles import lower, pack, unpack


def collected_floats(columns: int) -> int:
    """Return how many numbers are kept of an input of so many channels."""
    return columns * (columns + 1) // 2 + GRAM_AND_MOMENTS.below * columns


def write_collected(total: Tensor, entry: TensorEntry, write_rows: Callable[[TensorEntry, int, Tensor], None]) -> None:
    """Write a total of :data:`GRAM_AND_MOMENTS`, [C + 4, C], band by band.

    write_rows: as :meth:`billhook.layerworkers.transfer.BlockWriter.write_rows`.

    Raises:
        RunError: when the disk is full or fails.
    """
    written = 0
    for start, stop in bands(total.shape):
        packed = torch.from_numpy(pack(total[start:stop], start, lower))
        write_rows(entry, written, packed)
        written += len(packed)
    assert (written,) == entry.shape, f"{entry.name}: {written} numbers for {entry.shape}"


def read_collected(entry: TensorEntry, statistic: Statistic, columns: int, device: torch.device, read: Read) -> Tensor:
    """Return what ``statistic`` would be over the tokens that were collected; of a matrix the lower triangle is meant.

    statistic: one that :data:`GRAM_AND_MOMENTS` gives.

    Raises:
        RunError: when the disk fails.
    """
    assert GRAM_AND_MOMENTS.covers(statistic), f"{statistic.name} was not collected"
    triangle = columns * (columns + 1) // 2
    if statistic.dimensions == 1:  # the vectors of all of them are the first of the moments
        return read_rows(entry, triangle, triangle + statistic.vectors * columns, read).to(device)
    gram_CC = torch.empty(columns, columns, dtype=torch.float32, device=device)
    for start, stop in bands((columns, columns)):
        packed = read_rows(entry, start * (start + 1) // 2, stop * (stop + 1) // 2, read)
        gram_CC[start:stop] = unpack(packed.numpy(), (stop - start, columns), start, lower).to(device)
    return gram_CC
