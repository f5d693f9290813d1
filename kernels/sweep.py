"""The column sweep of SparseGPT inside one block of columns (arXiv 2301.00774, Algorithm 1).

Legend: R rows, B columns of the block. For each column j, from left to right, a row whose entry is pruned has the
error ``e = w_j / U_jj``; w_j becomes 0, and ``e U_jt`` is subtracted from its columns t > j. The errors E are
returned, since the columns right of the block are updated with them in one product. A channel that weighs nothing has
U_jj infinite: its error is 0.

Each function exists as a reference, which reads like the formula, and as a compiled loop over rows for the CPU, where
torch would spend its time launching B dependent steps. Rows are independent given the mask.
"""

from __future__ import annotations

from typing import Any

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
    """Do what :func:`sweep_masked_reference` does, by a compiled loop where the tensors are on the CPU."""
    if w_RB.device.type != "cpu":
        return sweep_masked_reference(w_RB, u_BB, prune_RB)
    w = w_RB.contiguous()
    error_RB = torch.zeros_like(w)
    compiled(_masked_loop)(w.numpy(), u_BB.contiguous().numpy(), prune_RB.contiguous().numpy(), error_RB.numpy())
    w_RB.copy_(w)
    return error_RB


def sweep_groups(w_RB: Tensor, u_BB: Tensor, keep: int, group: int) -> Tensor:
    """Do what :func:`sweep_groups_reference` does, by a compiled loop where the tensors are on the CPU."""
    if w_RB.device.type != "cpu":
        return sweep_groups_reference(w_RB, u_BB, keep, group)
    w = w_RB.contiguous()
    error_RB = torch.zeros_like(w)
    chosen = torch.zeros(group, dtype=torch.bool)
    compiled(_groups_loop)(w.numpy(), u_BB.contiguous().numpy(), keep, chosen.numpy(), error_RB.numpy())
    w_RB.copy_(w)
    return error_RB


def _masked_loop(w: Any, u: Any, prune: Any, error: Any) -> None:
    rows, columns = w.shape
    for r in range(rows):
        for j in range(columns):
            if prune[r, j]:
                e = w[r, j] / u[j, j]
                error[r, j] = e
                for t in range(j + 1, columns):
                    w[r, t] -= e * u[j, t]
                w[r, j] = 0.0


def _groups_loop(w: Any, u: Any, keep: int, chosen: Any, error: Any) -> None:
    rows, columns = w.shape
    group = chosen.shape[0]  # chosen is scratch: which entries of the group at hand are pruned
    for r in range(rows):
        for start in range(0, columns, group):
            chosen[:] = False
            for _ in range(group - keep):
                best = -1
                lowest = 0.0
                for i in range(group):
                    if not chosen[i]:
                        ratio = w[r, start + i] / u[start + i, start + i]
                        if best < 0 or ratio * ratio < lowest:
                            best = i
                            lowest = ratio * ratio
                chosen[best] = True
            for i in range(group):
                if chosen[i]:
                    j = start + i
                    e = w[r, j] / u[j, j]
                    error[r, j] = e
                    for t in range(j + 1, columns):
                        w[r, t] -= e * u[j, t]
                    w[r, j] = 0.0
