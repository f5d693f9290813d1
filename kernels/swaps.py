"""One removed weight comes back, one that is kept goes: swaps that lower a row's error most (SparseSwaps).

Legend: R rows (outputs), C columns (inputs). A row with dense weights w and sparse ones v has the error
``L = e A e^T``, ``e = w - v``. With ``c = e A``, letting p (v_p = 0) come back with its dense weight and u (v_u != 0)
go changes it by

    dL = -2 e_p c_p + e_p^2 A_pp + 2 v_u c_u + v_u^2 A_uu - 2 e_p v_u A_pu

(arXiv 2512.10922 for v = w on the support; here v_u may be anything). The best pair is taken as long as it lowers the
error, at most ``limit`` times. For an N:M pattern p and u lie in one group of columns.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from billhook.kernels.compiled import compiled
from billhook.kernels.products import matmul_by_rows, row_partitions

WORTH = 1e-6
"""Of a row's error, what a swap must save at least: less may be rounding."""


def swap_reference_(v_RC: Tensor, w_RC: Tensor, a_CC: Tensor, group: int, limit: int) -> None:
    """Swap in the rows of ``v_RC`` in place; of pairs that save the same, the one with the lowest p, then u, is taken.

    v_RC: [R, C] sparse; w_RC: [R, C] dense; a_CC: [C, C] symmetric. group: columns within which may be swapped; C for
    all of a row.
    """
    columns = v_RC.shape[1]
    same_group_CC = torch.arange(columns, device=v_RC.device) // group
    allowed_CC = same_group_CC[:, None] == same_group_CC
    diagonal_C = a_CC.diagonal()
    for v_C, w_C in zip(v_RC, w_RC, strict=True):
        for _ in range(limit):
            e_C = w_C - v_C
            c_C = e_C @ a_CC
            back_C = e_C * (e_C * diagonal_C - 2 * c_C)
            away_C = v_C * (v_C * diagonal_C + 2 * c_C)
            change_CC = back_C[:, None] + away_C - 2 * e_C[:, None] * v_C * a_CC
            change_CC[~(allowed_CC & (v_C == 0)[:, None] & (w_C != 0)[:, None] & (v_C != 0))] = torch.inf
            best = int(change_CC.argmin())
            p, u = best // columns, best % columns
            if not change_CC[p, u] < -WORTH * (e_C @ c_C):
                break
            v_C[p], v_C[u] = w_C[p], 0.0


def swap_(v_RC: Tensor, w_RC: Tensor, a_CC: Tensor, group: int, limit: int, partition_rows: int) -> None:
    """Do what :func:`swap_reference_` does, but for rounding: on a CPU in one compiled loop, else many rows at a time.

    Both keep c up to date, and look only at pairs that can be the best. With ``s_p = max_u |A_pu|``, u != p in p's
    group, a pair changes the error by at least ``back_p + (away_u - 2 |e_p| s_p |v_u|)``. The least value of the
    bracket over all u is found for LEVELS values of ``2 |e_p| s_p``, which answers for those below; a p whose bound is
    above a change that is already known is left out. partition_rows: rows of a product of many rows.
    """
    if v_RC.device.type != "cpu":
        swap_rows_together_(v_RC, w_RC, a_CC, group, limit, partition_rows)
        return
    v, w = v_RC.contiguous(), w_RC.contiguous()
    compiled(_loop)(v.numpy(), w.numpy(), a_CC.contiguous().numpy(), group, limit, np.float32(WORTH))
    v_RC.copy_(v)


ROUNDING = 1e-6
"""Of the terms of a bound, by how much it may be too high."""

LEVELS = 16
"""At which bounds are found: two registers' worth of lanes, known to the compiler."""

BAND_ROWS = 256
"""Rows that are worked on at a time where that is done in torch: what bounds its memory."""


def swap_rows_together_(v_RC: Tensor, w_RC: Tensor, a_CC: Tensor, group: int, limit: int, partition_rows: int) -> None:
    """Do what :func:`swap_` does in torch, for all rows of a band at once. An N:M group divides C."""
    c_RC = matmul_by_rows(w_RC - v_RC, a_CC, partition_rows)
    diagonal_C = a_CC.diagonal()
    strongest_C = _strongest(a_CC)
    best_of_rows = _best_of_groups if group < v_RC.shape[1] else _best_of_rows
    for start, stop in row_partitions(len(v_RC), BAND_ROWS):
        v_BC, w_BC, c_BC = v_RC[start:stop], w_RC[start:stop], c_RC[start:stop]
        for _ in range(limit):
            e_BC = w_BC - v_BC
            back_BC = (e_BC * diagonal_C - 2 * c_BC).mul_(e_BC).masked_fill_((v_BC != 0) | (w_BC == 0), torch.inf)
            away_BC = (v_BC * diagonal_C + 2 * c_BC).mul_(v_BC).masked_fill_(v_BC == 0, torch.inf)
            worth_B = -WORTH * (e_BC * c_BC).sum(dim=1)
            change_B, p_B, u_B = best_of_rows(back_BC, away_BC, e_BC, v_BC, a_CC, strongest_C, group)
            rows_S = (change_B < worth_B).nonzero()[:, 0]
            if not len(rows_S):
                break
            p_S, u_S = p_B[rows_S], u_B[rows_S]
            c_BC[rows_S] += v_BC[rows_S, u_S, None] * a_CC[u_S] - e_BC[rows_S, p_S, None] * a_CC[p_S]
            v_BC[rows_S, p_S], v_BC[rows_S, u_S] = w_BC[rows_S, p_S], 0.0


def _best_of_groups(
    back_BC: Tensor, away_BC: Tensor, e_BC: Tensor, v_BC: Tensor, a_CC: Tensor, strongest_C: Tensor, group: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the best pair's change of each row, its p and its u, of the pairs of N:M groups."""
    rows, columns = v_BC.shape
    a_GMM = a_CC.view(columns // group, group, columns // group, group).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    back_BGM1, e_BGM1 = (each.view(rows, -1, group, 1) for each in (back_BC, e_BC))
    away_BG1M, v_BG1M = (each.view(rows, -1, 1, group) for each in (away_BC, v_BC))
    change_BK = (back_BGM1 + away_BG1M - 2 * e_BGM1 * v_BG1M * a_GMM).flatten(1)
    change_B, best_B = _first_least(change_BK)
    p_B = best_B // group
    return change_B, p_B, p_B - p_B % group + best_B % group


def _best_of_rows(
    back_BC: Tensor, away_BC: Tensor, e_BC: Tensor, v_BC: Tensor, a_CC: Tensor, strongest_C: Tensor, group: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the same of the pairs of whole rows."""
    rows, columns = v_BC.shape

    def changes(rows_K: Tensor, p_K: Tensor) -> Tensor:
        """Return [K, C]: what letting each p of its row come back changes, by the u that goes."""
        twice_K1 = 2 * e_BC[rows_K, p_K, None]
        return back_BC[rows_K, p_K, None] + away_BC[rows_K] - twice_K1 * v_BC[rows_K] * a_CC[p_K]

    size_BC = v_BC.abs()
    pull_BC = (2 * e_BC.abs() * strongest_C).masked_fill_(back_BC == torch.inf, 0.0)
    most_B = pull_BC.amax(dim=1)
    least_BL = torch.stack(
        [(away_BC - (most_B * (level + 1) / LEVELS)[:, None] * size_BC).amin(dim=1) for level in range(LEVELS)], dim=1
    )
    level_BC = (pull_BC / most_B[:, None] * LEVELS).nan_to_num_(0.0).long().clamp_(0, LEVELS - 1)
    bound_BC = back_BC + least_BL.gather(1, level_BC)
    terms_BC = torch.where(back_BC < torch.inf, back_BC, away_BC)
    largest_B = terms_BC.masked_fill_(terms_BC == torch.inf, 0.0).abs().amax(dim=1)
    slack_B = ROUNDING * (largest_B + most_B * size_BC.amax(dim=1))
    every_B = torch.arange(rows, device=v_BC.device)
    known_B = changes(every_B, bound_BC.argmin(dim=1)).amin(dim=1)
    rows_S, p_S = ((bound_BC <= (known_B + slack_B)[:, None]) & (back_BC < torch.inf)).nonzero().unbind(dim=1)
    change_S = torch.cat(
        [
            changes(rows_K, p_K).amin(dim=1)
            for rows_K, p_K in zip(torch.split(rows_S, 4 * rows), torch.split(p_S, 4 * rows), strict=True)
        ]
    )
    change_B = torch.full_like(known_B, torch.inf).scatter_reduce_(0, rows_S, change_S, "amin")
    first_S = p_S.masked_fill(change_S != change_B[rows_S], columns - 1)
    p_B = torch.full_like(every_B, columns - 1).scatter_reduce_(0, rows_S, first_S, "amin")
    return change_B, p_B, _first_least(changes(every_B, p_B))[1]


def _strongest(a_CC: Tensor) -> Tensor:
    """Return the largest |A_pu|, u != p, of each p, a band of rows at a time."""
    strongest_C = torch.empty_like(a_CC[0])
    for start, stop in row_partitions(len(a_CC), BAND_ROWS):
        sizes_BC = a_CC[start:stop].abs()
        sizes_BC.diagonal(start).zero_()
        strongest_C[start:stop] = sizes_BC.amax(dim=1)
    return strongest_C


def _first_least(values_BK: Tensor) -> tuple[Tensor, Tensor]:
    """Return the least value of each row, and the first place where it stands."""
    least_B = values_BK.amin(dim=1)
    places_K = torch.arange(values_BK.shape[1], device=values_BK.device)
    return least_B, torch.where(values_BK == least_B[:, None], places_K, values_BK.shape[1] - 1).amin(dim=1)


def _loop(v: Any, w: Any, a: Any, group: int, limit: int, worth: Any) -> None:  # noqa: PLR0912, PLR0915 - compiled whole
    rows, columns = v.shape
    infinity, two, zero = np.float32(np.inf), np.float32(2.0), np.float32(0.0)
    rounding = np.float32(ROUNDING)
    strongest = np.zeros(columns, dtype=np.float32)
    for p in range(columns):
        start = p - p % group
        for u in range(start, min(start + group, columns)):
            if u != p:
                strongest[p] = max(strongest[p], abs(a[p, u]))
    c = np.empty(columns, dtype=np.float32)
    back = np.empty(columns, dtype=np.float32)
    away = np.empty(columns, dtype=np.float32)
    pull = np.empty(columns, dtype=np.float32)  # 2 |e_p| s_p
    bound = np.empty(columns, dtype=np.float32)
    level_pull = np.empty(LEVELS, dtype=np.float32)
    level_least = np.empty(LEVELS, dtype=np.float32)
    near = np.empty(columns, dtype=np.int64)  # columns u that can be of the best pair, and where each group's begin
    first_near = np.empty((columns + group - 1) // group + 1, dtype=np.int64)
    for row in range(rows):
        c[:] = zero
        for j in range(columns):
            e = w[row, j] - v[row, j]
            if e != zero:
                for k in range(columns):
                    c[k] += e * a[j, k]
        for _ in range(limit):
            error, most_pull, least_back = zero, zero, infinity
            largest, heaviest = zero, zero
            for j in range(columns):
                x = v[row, j]
                e = w[row, j] - x
                error += e * c[j]
                back[j], away[j] = infinity, infinity
                if x != zero:
                    away[j] = x * (x * a[j, j] + two * c[j])
                    largest = max(largest, abs(away[j]))
                    heaviest = max(heaviest, abs(x))
                elif e != zero:
                    back[j] = e * (e * a[j, j] - two * c[j])
                    least_back = min(least_back, back[j])
                    largest = max(largest, abs(back[j]))
                    pull[j] = two * abs(e) * strongest[j]
                    most_pull = max(most_pull, pull[j])
            for level in range(LEVELS):
                level_pull[level] = most_pull * np.float32(level + 1) / np.float32(LEVELS)
                level_least[level] = infinity
            for u in range(columns):
                if away[u] != infinity:
                    x = abs(v[row, u])
                    for level in range(LEVELS):
                        change = away[u] - level_pull[level] * x
                        level_least[level] = change if change < level_least[level] else level_least[level]
            likely = -1
            for p in range(columns):
                if back[p] != infinity:
                    level = int(pull[p] / most_pull * np.float32(LEVELS)) if zero < most_pull < infinity else 0
                    bound[p] = back[p] + level_least[min(level, LEVELS - 1)]
                    if likely < 0 or bound[p] < bound[likely]:
                        likely = p
            if likely < 0:
                break
            # the best change is not above what is known, and bounds are right but for their rounding
            known = -worth * error
            slack = rounding * (largest + most_pull * heaviest)
            start = likely - likely % group
            twice = two * w[row, likely]
            for u in range(start, min(start + group, columns)):
                change = back[likely] + (away[u] - twice * v[row, u] * a[likely, u])
                known = change if change < known else known
            count = 0
            for u in range(columns):
                if u % group == 0:
                    first_near[u // group] = count
                if away[u] - most_pull * abs(v[row, u]) <= known + slack - least_back:
                    near[count] = u
                    count += 1
            first_near[-1] = count
            best, best_p, best_u = -worth * error, -1, -1
            for p in range(columns):
                if back[p] == infinity or bound[p] > known + slack:
                    continue
                twice = two * w[row, p]
                for i in range(first_near[p // group], first_near[p // group + 1]):
                    u = near[i]
                    change = back[p] + (away[u] - twice * v[row, u] * a[p, u])
                    if change < best:
                        best, best_p, best_u = change, p, u
                known = min(known, best)
            if best_p < 0:
                break
            e, x = w[row, best_p], v[row, best_u]
            for k in range(columns):
                c[k] += x * a[best_u, k] - e * a[best_p, k]
            v[row, best_p], v[row, best_u] = e, zero
