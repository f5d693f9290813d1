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


def swap_(v_RC: Tensor, w_RC: Tensor, a_CC: Tensor, group: int, limit: int) -> None:
    """Do what :func:`swap_reference_` does, on a CPU in one compiled loop, which keeps c up to date instead."""
    if v_RC.device.type != "cpu":
        swap_reference_(v_RC, w_RC, a_CC, group, limit)
        return
    v, w = v_RC.contiguous(), w_RC.contiguous()
    compiled(_loop)(v.numpy(), w.numpy(), a_CC.contiguous().numpy(), group, limit, np.float32(WORTH))
    v_RC.copy_(v)


LANES = 32
"""Columns that are compared at once: known to the compiler."""


def _loop(v: Any, w: Any, a: Any, group: int, limit: int, worth: Any) -> None:  # noqa: PLR0912 - compiled whole
    rows, columns = v.shape
    infinity, two, zero = np.float32(np.inf), np.float32(2.0), np.float32(0.0)
    away = np.empty(columns + LANES, dtype=np.float32)
    gone = np.zeros(columns + LANES, dtype=np.float32)  # v, and zeros behind the last column
    c = np.empty(columns, dtype=np.float32)
    least = np.empty(LANES, dtype=np.float32)
    for row in range(rows):
        c[:] = zero
        for j in range(columns):
            e = w[row, j] - v[row, j]
            if e != zero:
                for k in range(columns):
                    c[k] += e * a[j, k]
        for _ in range(limit):
            error = zero
            away[:] = infinity
            for j in range(columns):
                x = v[row, j]
                error += (w[row, j] - x) * c[j]
                gone[j] = x
                if x != zero:
                    away[j] = x * (x * a[j, j] + two * c[j])
            best, best_p, best_u = -worth * error, -1, -1
            for p in range(columns):
                e = w[row, p]
                if v[row, p] != zero or e == zero:
                    continue
                back = e * (e * a[p, p] - two * c[p])
                twice = two * e
                start = p - p % group
                stop = min(start + group, columns)
                least[:] = infinity
                whole = start + (stop - start) // LANES * LANES
                for first in range(start, whole, LANES):
                    for i in range(LANES):
                        change = away[first + i] - twice * gone[first + i] * a[p, first + i]
                        least[i] = change if change < least[i] else least[i]
                lowest = infinity
                for i in range(LANES):
                    lowest = least[i] if least[i] < lowest else lowest
                for u in range(whole, stop):
                    change = away[u] - twice * gone[u] * a[p, u]
                    lowest = change if change < lowest else lowest
                if back + lowest < best:
                    for u in range(start, stop):
                        if away[u] - twice * gone[u] * a[p, u] == lowest:
                            best, best_p, best_u = back + lowest, p, u
                            break
            if best_p < 0:
                break
            e, x = w[row, best_p], v[row, best_u]
            for k in range(columns):
                c[k] += x * a[best_u, k] - e * a[best_p, k]
            v[row, best_p], v[row, best_u] = e, zero
