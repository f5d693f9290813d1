"""Factorisations of a damped Gram matrix: on a CPU in place, in one [C, C] buffer; elsewhere torch makes copies.

Every function takes a contiguous float32 [C, C] tensor that is symmetric in full, and uses its upper triangle as the
copy from which a failed attempt is undone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from billhook.kernels import lapack
from billhook.kernels.gram import mirror_lower_
from billhook.kernels.threads import safe_threads


class NotPositiveDefiniteError(ArithmeticError):
    """No damping of the ladder made the matrix positive definite; ``args[0]`` is the last one tried."""


def upper_factor_reference(h_CC: Tensor) -> Tensor:
    """Return U upper triangular with ``H^-1 = U^T U``, [C, C] float64: the specification of the fast version."""
    factor_CC: Tensor = torch.linalg.cholesky(torch.linalg.inv(h_CC.double()), upper=True)
    return factor_CC


def reverse_(a_CC: Tensor) -> None:
    """Reverse rows and columns of a contiguous ``a_CC`` in place (``J A J``, J the exchange matrix)."""
    flat = a_CC.view(-1)
    size, step = flat.numel(), 1 << 20
    for start in range(0, size // 2, step):
        stop = min(start + step, size // 2)
        head = flat[start:stop].clone()
        flat[start:stop] = flat[size - stop : size - start].flip(0)
        flat[size - stop : size - start] = head.flip(0)


def cholesky_lower_(a_CC: Tensor, dampings: Sequence[float]) -> list[float]:
    """Replace the lower triangle of ``a_CC`` by L with ``A + d I = L L^T``; return the dampings d tried, in order.

    a_CC: [C, C] float32, symmetric; its strict upper triangle is left as it was.
    dampings: absolute amounts added to the diagonal of A, tried in turn until the factorisation succeeds.

    Raises:
        NotPositiveDefiniteError: when none of them does.
    """
    diagonal_C = a_CC.diagonal().clone()
    for tried, damping in enumerate(dampings, start=1):
        a_CC.diagonal().copy_(diagonal_C + damping)
        if _try_cholesky_lower_(a_CC):
            return list(dampings[:tried])
        _restore_lower_(a_CC)
    raise NotPositiveDefiniteError(dampings[-1])


def _try_cholesky_lower_(a_CC: Tensor) -> bool:
    if a_CC.device.type == "cpu":
        with safe_threads(a_CC.shape[0]):
            return lapack.cholesky(a_CC)
    factor_CC, info_device = torch.linalg.cholesky_ex(a_CC)
    a_CC.copy_(factor_CC.tril_() + a_CC.triu(1))
    return bool(info_device.item() == 0)


def _restore_lower_(a_CC: Tensor) -> None:
    size = a_CC.shape[0]
    for start in range(0, size, 512):
        stop = min(start + 512, size)
        a_CC[stop:, start:stop] = a_CC[start:stop, stop:].T
        corner = a_CC[start:stop, start:stop]
        corner.copy_(corner.triu() + corner.triu(1).T)


def inverse_upper_factor_(h_CC: Tensor, dampings: Sequence[float]) -> list[float]:
    """Replace ``h_CC`` by U, upper triangular, with ``(H + d I)^-1 = U^T U``; return the dampings tried.

    With J the exchange matrix and ``J (H + d I) J = L L^T``, ``U = J L^-1 J``: no inverse is ever formed.
    U is what SparseGPT (arXiv 2301.00774, section 3.3) calls the Cholesky factor of the inverse Hessian:
    ``U_jj^2`` is the leading entry of the inverse of the trailing matrix ``H_j:,j:``.

    Raises:
        NotPositiveDefiniteError: as :func:`cholesky_lower_`.
    """
    reverse_(h_CC)
    tried = cholesky_lower_(h_CC, dampings)
    if h_CC.device.type == "cpu":
        with safe_threads(h_CC.shape[0]):
            invertible = lapack.invert_triangle(h_CC)
        assert invertible
    else:
        identity_CC = torch.eye(h_CC.shape[0], device=h_CC.device)
        h_CC.copy_(torch.linalg.solve_triangular(h_CC.tril(), identity_CC, upper=False))
    h_CC.tril_()
    reverse_(h_CC)
    return tried


def inverse_(a_CC: Tensor, dampings: Sequence[float]) -> list[float]:
    """Replace the symmetric ``a_CC`` by ``(A + d I)^-1``, symmetric in full; return the dampings tried.

    Raises:
        NotPositiveDefiniteError: as :func:`cholesky_lower_`.
    """
    tried = cholesky_lower_(a_CC, dampings)
    if a_CC.device.type == "cpu":
        with safe_threads(a_CC.shape[0]):
            invertible = lapack.invert_from_cholesky(a_CC)
        assert invertible
    else:
        a_CC.copy_(torch.cholesky_inverse(a_CC.tril()))
    mirror_lower_(a_CC)
    return tried
