"""Second moments of a linear's input: the Gram matrix, its diagonal, and products with what deviates.

Legend: T tokens, C input channels of the linear, B those of a band, L those up to its last, K channels that deviate.
"""

from __future__ import annotations

import os
from functools import cache

import torch
from torch import Tensor

from billhook.kernels import lapack
from billhook.kernels.threads import safe_threads


def gram_reference(x_TC: Tensor) -> Tensor:
    """Return the Gram matrix ``X^T X`` of ``x_TC``, [C, C], in float64: the specification of :func:`add_gram_`."""
    x64_TC = x_TC.double()
    return x64_TC.T @ x64_TC


def add_gram_(gram_CC: Tensor, x_TC: Tensor) -> None:
    """Add ``X^T X`` to the lower triangle of ``gram_CC``, in place; the part above the diagonal is left alone.

    gram_CC: [C, C] float32, contiguous. x_TC: [T, C] of any float dtype, on the same device.
    Half of the products are enough, since the Gram matrix is symmetric: BLAS ``syrk`` on a CPU, or, of bfloat16, see
    :mod:`billhook.kernels.gram_bfloat16`. On other devices, where torch offers none, see :func:`add_gram_by_bands_`;
    something may be added above the diagonal there.
    """
    if gram_CC.device.type != "cpu":
        add_gram_by_bands_(gram_CC, x_TC)
        return
    if x_TC.dtype == torch.bfloat16 and cpu_multiplies_bfloat16():
        from billhook.kernels import gram_bfloat16  # imports numba

        gram_bfloat16.add_gram(gram_CC, x_TC)
        return
    with safe_threads(gram_CC.shape[0]):
        lapack.add_gram(gram_CC, x_TC.float().contiguous())


@cache
def cpu_multiplies_bfloat16() -> bool:
    """Whether this machine's CPU does, and numba is left to compile for it."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    told = {"NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES", "NUMBA_ENABLE_AVX", "NUMBA_DISABLE_JIT"} & set(os.environ)
    return not told and bool(capabilities.get("avx512_bf16", False))


BAND_ROWS = 2048
"""Rows of a Gram matrix that are one product: what lies above the diagonal in them is computed for nothing."""


def add_gram_by_bands_(gram_CC: Tensor, x_TC: Tensor, band_rows: int = BAND_ROWS) -> None:
    """Add ``X^T X`` to the lower triangle of ``gram_CC``, a band of rows at a time, each up to its last diagonal entry.

    Inputs of 16 bits are multiplied as they are: their products are exact in float32, and tensor cores sum them so.
    """
    for start in range(0, gram_CC.shape[0], band_rows):
        stop = min(start + band_rows, gram_CC.shape[0])
        band_BL, x_BT, x_TL = gram_CC[start:stop, :stop], x_TC[:, start:stop].T, x_TC[:, :stop]
        if x_TC.dtype.itemsize == 2:
            band_BL += torch.mm(x_BT, x_TL, out_dtype=torch.float32)
        else:
            band_BL.addmm_(x_BT.float(), x_TL.float())


def add_cross_(cross_KC: Tensor, d_TK: Tensor, x_TC: Tensor) -> None:
    """Add ``D^T X`` to ``cross_KC`` [K, C] float32, in place: the products of other channels with those of the input.

    d_TK: [T, K], x_TC: [T, C], of one float dtype. What is of 16 bits is multiplied exactly and summed in float32.
    """
    if cross_KC.device.type != "cpu" and x_TC.dtype.itemsize == 2:
        cross_KC += torch.mm(d_TK.T, x_TC, out_dtype=torch.float32)
        return
    with safe_threads(cross_KC.shape[0]):
        cross_KC.addmm_(d_TK.T.float(), x_TC.float())


def mirror_lower_(a_CC: Tensor) -> None:
    """Copy the lower triangle of ``a_CC`` [C, C] over the upper one, in place, a band of rows at a time."""
    size = a_CC.shape[0]
    for start in range(0, size, 512):
        stop = min(start + 512, size)
        a_CC[start:stop, stop:] = a_CC[stop:, start:stop].T
        corner = a_CC[start:stop, start:stop]
        corner.copy_(corner.tril() + corner.tril(-1).T)


def add_moments_(moments_4C: Tensor, x_TC: Tensor) -> None:
    """Add columns' squared 2-norms and sums of a sample ``x_TC`` [T, C], T, and 1 to ``moments_4C``, [4 C] float32."""
    squares_C, sums_C, tokens_C, samples_C = moments_4C.view(4, -1)
    add_column_squares_(squares_C, x_TC)
    sums_C += x_TC.float().sum(dim=0)
    tokens_C += len(x_TC)
    samples_C += 1


def add_column_squares_(squares_C: Tensor, x_TC: Tensor) -> None:
    """Add the squared 2-norm of each column of ``x_TC`` [T, C] to ``squares_C`` [C] float32, in place."""
    squares_C += x_TC.float().square().sum(dim=0)
