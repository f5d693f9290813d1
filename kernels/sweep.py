"""The column sweep of SparseGPT inside one block of columns (arXiv 2301.00774, Algorithm 1).

Legend: R rows, B columns of the block. For each column j, from left to right, a row whose entry is pruned has the
error ``e = w_j / U_jj``; w_j becomes 0, and ``e U_jt`` is subtracted from its columns t > j. The errors E are
returned, since the columns right of the block are updated with them in one product. A channel that weighs nothing has
U_jj infinite: its error is 0.

Each function exists as a reference, which reads like the formula, and as one kernel, where torch would spend its time
launching B dependent steps: a compiled loop for the CPU, and Triton's for a GPU. Rows are independent given the mask.
The loop takes them a tile at a time, transposed; every update is made in the order of the columns, so neither tiles
nor passes change a bit.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from billhook.kernels.compiled import compiled
from billhook.kernels.select import smallest_in_rows


def sweep_masked_reference(w_RB: Tensor, u_BB: Tensor, prune_RB: Tensor) -> Tensor:
    """Sweep the block with a mask that is already chosen; ``w_RB`` is updated in place, E [R, B] is returned.

    w_RB: [R, B] weights. u_BB: [B, B] this block's corner of U, upper triangular. prune_RB: [R, B] bool.
    """
    error_RB = torch.zeros_like(w_RB)
    for j in range(w_RB.shape[1]):
        e_R = torch.where(prune_RB[:, j], w_RB[:, j] / u_BB[j, j], 0.0)
        w_RB[:, j + 1 :] -= e_R[:, None] * u_BB[j, j + 1 :]
        w_RB[:, j] = torch.where(prune_RB[:, j], 0.0, w_RB[:, j])
        error_RB[:, j] = e_R
    return error_RB


def sweep_groups_reference(w_RB: Tensor, u_BB: Tensor, keep: int, group: int) -> Tensor:
    """Sweep the block for an N:M pattern, choosing each group when the sweep reaches it; as the masked sweep else.

    In every ``group`` consecutive columns the ``group - keep`` entries with the smallest ``w_j^2 / U_jj^2`` are
    pruned, w being what the columns to the left have made of it. B must be a multiple of ``group``.
    """
    error_RB = torch.zeros_like(w_RB)
    diagonal_B = u_BB.diagonal()
    prune_RB = torch.zeros_like(w_RB, dtype=torch.bool)
    for j in range(w_RB.shape[1]):
        if j % group == 0:
            score = (w_RB[:, j : j + group] / diagonal_B[j : j + group]).square()
            prune_RB[:, j : j + group] = smallest_in_rows(score, group - keep)
        e_R = torch.where(prune_RB[:, j], w_RB[:, j] / u_BB[j, j], 0.0)
        w_RB[:, j + 1 :] -= e_R[:, None] * u_BB[j, j + 1 :]
        w_RB[:, j] = torch.where(prune_RB[:, j], 0.0, w_RB[:, j])
        error_RB[:, j] = e_R
    return error_RB


def sweep_masked(w_RB: Tensor, u_BB: Tensor, prune_RB: Tensor) -> Tensor:
    """Do what :func:`sweep_masked_reference` does, in one kernel where there is one for the tensors' device."""
    if not _has_kernel(w_RB):
        return sweep_masked_reference(w_RB, u_BB, prune_RB)
    return _sweep(w_RB, u_BB, prune_RB, 0, w_RB.shape[1])


def sweep_groups(w_RB: Tensor, u_BB: Tensor, keep: int, group: int) -> Tensor:
    """Do what :func:`sweep_groups_reference` does, in one kernel where there is one for the tensors' device."""
    if not _has_kernel(w_RB):
        return sweep_groups_reference(w_RB, u_BB, keep, group)
    return _sweep(w_RB, u_BB, torch.zeros_like(w_RB, dtype=torch.bool), group - keep, group)


WIDEST_ON_GPU = 512
"""Columns of a block up to which a tile of its rows stays in a GPU's registers."""


def _has_kernel(w_RB: Tensor) -> bool:
    on_gpu = w_RB.device.type != "cpu"
    return not on_gpu or (w_RB.shape[1] <= WIDEST_ON_GPU and find_spec("triton") is not None)


def _sweep(w_RB: Tensor, u_BB: Tensor, prune_RB: Tensor, remove: int, group: int) -> Tensor:
    w, u, prune = w_RB.contiguous(), u_BB.contiguous(), prune_RB.contiguous()
    if w.device.type == "cpu":
        error_RB = torch.empty_like(w)
        compiled(_loop)(w.numpy(), u.numpy(), prune.numpy(), remove, group, error_RB.numpy())
    else:
        from billhook.kernels import sweep_triton

        error_RB = sweep_triton.sweep(w, u, prune, remove, group)
    w_RB.copy_(w)
    return error_RB


TILE_ROWS = 64
"""Rows that lie beside each other in the tile, so that one instruction updates several; known to the compiler."""
TOGETHER = 4
"""Columns whose errors reach those right of them in one pass over the tile; the pass is written out below."""


def _loop(w: Any, u: Any, prune: Any, remove: int, group: int, error: Any) -> None:  # noqa: PLR0912 - compiled whole
    """Sweep the rows of ``w``; in every ``group`` columns the ``remove`` smallest scores join the mask first."""
    rows, columns = w.shape
    zero = np.float32(0.0)
    tile = np.zeros((columns, TILE_ROWS), dtype=np.float32)  # the weights; of what is pruned, the error
    gone = np.zeros((columns, TILE_ROWS), dtype=np.bool_)
    e = np.zeros((TOGETHER, TILE_ROWS), dtype=np.float32)
    score = np.zeros((group, TILE_ROWS), dtype=np.float32)
    before = np.zeros(TILE_ROWS, dtype=np.int32)
    for first in range(0, rows, TILE_ROWS):
        count = min(TILE_ROWS, rows - first)  # the rest of the tile is swept as well, and not looked at
        for i in range(count):
            for j in range(columns):
                tile[j, i] = w[first + i, j]
                gone[j, i] = prune[first + i, j]
        for start in range(0, columns, group):
            stop = min(start + group, columns)
            if remove > 0:
                for j in range(start, stop):
                    for i in range(TILE_ROWS):
                        ratio = tile[j, i] / u[j, j]
                        score[j - start, i] = ratio * ratio
                for j in range(stop - start):
                    before[:] = 0
                    for k in range(stop - start):
                        for i in range(TILE_ROWS):
                            # Of two that are equal the left one goes first; NaN, in this order, is never all that goes.
                            before[i] += not score[k, i] > score[j, i] if k < j else score[k, i] < score[j, i]
                    for i in range(TILE_ROWS):
                        gone[start + j, i] = gone[start + j, i] or before[i] < remove
            for left in range(start, stop, TOGETHER):
                right = min(left + TOGETHER, stop)
                for j in range(left, right):
                    for i in range(TILE_ROWS):
                        quotient = tile[j, i] / u[j, j]
                        e[j - left, i] = quotient if gone[j, i] else zero
                        tile[j, i] = quotient if gone[j, i] else tile[j, i]
                    for t in range(j + 1, right):
                        for i in range(TILE_ROWS):
                            tile[t, i] -= e[j - left, i] * u[j, t]
                if right - left == TOGETHER:
                    for t in range(right, columns):
                        u0, u1, u2, u3 = u[left, t], u[left + 1, t], u[left + 2, t], u[left + 3, t]
                        for i in range(TILE_ROWS):
                            tile[t, i] = tile[t, i] - e[0, i] * u0 - e[1, i] * u1 - e[2, i] * u2 - e[3, i] * u3
                else:
                    for j in range(left, right):
                        for t in range(right, columns):
                            for i in range(TILE_ROWS):
                                tile[t, i] -= e[j - left, i] * u[j, t]
        for i in range(count):
            for j in range(columns):
                error[first + i, j] = tile[j, i] if gone[j, i] else zero
                w[first + i, j] = zero if gone[j, i] else tile[j, i]
