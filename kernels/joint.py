"""Remove several weights of each row at once: the best update of the others, by the optimal brain surgeon.

Legend: R rows (outputs), B columns of the block at hand, Q those of them that are removed from a row.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from billhook.kernels.compiled import compiled
from billhook.kernels.factor import NotPositiveDefiniteError
from billhook.kernels.products import matmul_by_rows

ROWS_AT_ONCE = 64
"""Rows whose systems of equations are solved in one call, on a GPU."""


def remove_jointly_(w_RB: Tensor, u_BB: Tensor, prune_RB: Tensor, partition_rows: int) -> Tensor:
    """Remove the entries of the mask from ``w_RB``, in place; return E [R, B] for the columns right of the block.

    With ``H^-1 = U^T U`` the inverse Hessian of these columns and those right of them, U upper triangular, and K its
    corner for the block, a row w with the removed entries q loses ``lambda K_q:``, ``K_qq lambda = w_q`` (Thanos, arXiv
    2504.05346, section 4). With ``E = lambda U_BB^T``, K being ``U_BB^T U_BB``, that is ``E U``, here and right of the
    block, and the squared error rises by ``E E^T``.

    w_RB: [R, B] float32. u_BB: [B, B], upper triangular; where a channel weighs nothing, infinite on the diagonal and
    0 beside it. prune_RB: [R, B] bool. partition_rows: as of :func:`billhook.kernels.products.matmul_by_rows`.

    Raises:
        NotPositiveDefiniteError: when a ``K_qq`` is not, in float64.
    """
    u_BB = torch.where(torch.isinf(u_BB), 1.0, u_BB)
    k_BB = u_BB.double().T @ u_BB.double()
    multipliers_RB = _multipliers(w_RB, k_BB, prune_RB)
    error_RB = matmul_by_rows(multipliers_RB, u_BB.T.contiguous(), partition_rows)
    w_RB.sub_(matmul_by_rows(error_RB, u_BB, partition_rows)).masked_fill_(prune_RB, 0.0)
    return error_RB


def multipliers_reference(w_RB: Tensor, k_BB: Tensor, prune_RB: Tensor) -> Tensor:
    """Return lambda of each row, [R, B] float32, 0 where nothing is removed: ``K_qq lambda_q = w_q``, in float64.

    Raises:
        NotPositiveDefiniteError: when a ``K_qq`` is not.
    """
    multipliers_RB = torch.zeros_like(w_RB)
    for start in range(0, len(w_RB), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        gone_LB = prune_RB[rows].double()
        system_LBB = k_BB * gone_LB[:, :, None] * gone_LB[:, None, :] + torch.diag_embed(1 - gone_LB)
        factor_LBB, info_L = torch.linalg.cholesky_ex(system_LBB)
        if int(info_L.count_nonzero()):
            raise NotPositiveDefiniteError(0.0)
        right_LB1 = (w_RB[rows] * gone_LB)[:, :, None]
        multipliers_RB[rows] = torch.cholesky_solve(right_LB1, factor_LBB)[:, :, 0].float()
    return multipliers_RB


def _multipliers(w_RB: Tensor, k_BB: Tensor, prune_RB: Tensor) -> Tensor:
    """Do what :func:`multipliers_reference` does, on a CPU in a compiled loop over what is removed alone."""
    if w_RB.device.type != "cpu":
        return multipliers_reference(w_RB, k_BB, prune_RB)
    multipliers_RB = torch.zeros_like(w_RB, memory_format=torch.contiguous_format)
    failed = np.zeros(1, dtype=np.int64)
    operands = (w_RB.contiguous(), k_BB.contiguous(), prune_RB.contiguous(), multipliers_RB)
    compiled(_loop)(*(each.numpy() for each in operands), failed)
    if failed[0]:
        raise NotPositiveDefiniteError(0.0)
    return multipliers_RB


def _loop(w: Any, k: Any, prune: Any, multipliers: Any, failed: Any) -> None:
    """Solve each row's equations by ``K_qq = V^T V``, V upper triangular, in the place of its upper triangle."""
    rows, columns = w.shape
    chosen = np.empty(columns, dtype=np.int64)
    v = np.empty((columns, columns), dtype=np.float64)
    x = np.empty(columns, dtype=np.float64)
    for row in range(rows):
        count = 0
        for j in range(columns):
            if prune[row, j]:
                chosen[count] = j
                count += 1
        for i in range(count):
            x[i] = w[row, chosen[i]]
            for j in range(i, count):
                v[i, j] = k[chosen[i], chosen[j]]
        for i in range(count):
            if not v[i, i] > 0.0:
                failed[0] += 1
                return
            pivot = 1.0 / np.sqrt(v[i, i])
            for j in range(i, count):
                v[i, j] *= pivot
            x[i] /= v[i, i]
            for below in range(i + 1, count):
                factor = v[i, below]
                x[below] -= factor * x[i]
                for j in range(below, count):
                    v[below, j] -= factor * v[i, j]
        for i in range(count - 1, -1, -1):
            rest = x[i]
            for j in range(i + 1, count):
                rest -= v[i, j] * x[j]
            x[i] = rest / v[i, i]
            multipliers[row, chosen[i]] = x[i]
