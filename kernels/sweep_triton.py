"""The column sweep on a GPU: one Triton program for a tile of rows, which stays in registers for the whole block.

See :mod:`billhook.kernels.sweep` for what is computed; R and B are rows and columns of the block here, too. With
``TRITON_INTERPRET=1`` it runs on a CPU, slowly.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE_ROWS = 16


def sweep(w_RB: Tensor, u_BB: Tensor, prune_RB: Tensor, remove: int, group: int) -> Tensor:
    """Sweep with the mask ``prune_RB``, which the ``remove`` smallest scores of every ``group`` columns join first.

    w_RB: [R, B] float32, updated in place; u_BB: [B, B] float32, upper triangular; prune_RB: [R, B] bool. All are
    contiguous. Returns the errors E [R, B].
    """
    rows, columns = w_RB.shape
    error_RB = torch.empty_like(w_RB)
    width = triton.next_power_of_2(columns)
    _sweep[(triton.cdiv(rows, TILE_ROWS),)](
        w_RB, u_BB, prune_RB, error_RB, rows, columns, remove, group, WIDTH=width, TILE=TILE_ROWS
    )
    return error_RB


@triton.jit
def _sweep(
    w_pointer: Any,
    u_pointer: Any,
    prune_pointer: Any,
    error_pointer: Any,
    rows: Any,
    columns: Any,
    remove: Any,
    group: Any,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    column = tl.arange(0, WIDTH)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    place = row[:, None].to(tl.int64) * columns + column[None, :]
    w = tl.load(w_pointer + place, mask=inside, other=0.0)
    gone = tl.load(prune_pointer + place, mask=inside, other=0).to(tl.int1)
    diagonal = tl.load(u_pointer + column * (columns + 1), mask=column < columns, other=1.0)
    error = tl.zeros((TILE, WIDTH), dtype=tl.float32)
    for j in range(columns):
        if remove > 0 and j % group == 0:
            ratio = w / diagonal[None, :]
            score = ratio * ratio
            candidate = ((column >= j) & (column < j + group))[None, :] & inside
            for _ in range(remove):
                lowest = tl.min(tl.where(candidate, score, float("inf")), axis=1)
                smallest = candidate & (score == lowest[:, None])
                first = tl.min(tl.where(smallest, column[None, :], WIDTH), axis=1)
                chosen = column[None, :] == first[:, None]
                gone = gone | chosen
                candidate = candidate & (column[None, :] != first[:, None])
        here = (column == j)[None, :]
        leaves = here & gone
        e = tl.sum(tl.where(leaves, w, 0.0), axis=1) / tl.load(u_pointer + j * (columns + 1))
        u = tl.load(u_pointer + j * columns + column, mask=(column > j) & (column < columns), other=0.0)
        w = tl.where(leaves, 0.0, w - e[:, None] * u[None, :])
        error = tl.where(here, e[:, None], error)
    tl.store(w_pointer + place, w, mask=inside)
    tl.store(error_pointer + place, error, mask=inside)
