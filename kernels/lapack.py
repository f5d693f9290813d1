"""Routines of the BLAS and LAPACK that SciPy brings, in place on tensors, without Python's lock.

SciPy's own wrappers keep the lock for the whole call, which takes minutes for the widest matrices: no other thread of
the process would run meanwhile. A row-major array is read as its column-major transpose: what LAPACK calls the upper
triangle is the lower one here.

All matrices are contiguous float32 tensors on the CPU, square [C, C] where not said otherwise; the other triangle is
left as it is.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from scipy.linalg import cython_blas, cython_lapack
from torch import Tensor

_LOWER = ctypes.c_char(b"U")
_PLAIN = ctypes.c_char(b"N")


def cholesky(a_CC: Tensor) -> bool:
    """Replace the lower triangle by L with ``A = L L^T`` (``spotrf``); False where A is not positive definite."""
    size, info = ctypes.c_int(len(a_CC)), ctypes.c_int()
    _routine(cython_lapack, "spotrf")(_at(_LOWER), _at(size), _data(a_CC), _at(size), _at(info))
    return info.value == 0


def invert_triangle(l_CC: Tensor) -> bool:
    """Replace the lower triangle by its inverse (``strtri``); False where it has none."""
    size, info = ctypes.c_int(len(l_CC)), ctypes.c_int()
    _routine(cython_lapack, "strtri")(_at(_LOWER), _at(_PLAIN), _at(size), _data(l_CC), _at(size), _at(info))
    return info.value == 0


def invert_from_cholesky(l_CC: Tensor) -> bool:
    """Replace the lower triangle L by that of ``(L L^T)^-1`` (``spotri``); False where there is no inverse."""
    size, info = ctypes.c_int(len(l_CC)), ctypes.c_int()
    _routine(cython_lapack, "spotri")(_at(_LOWER), _at(size), _data(l_CC), _at(size), _at(info))
    return info.value == 0


def add_gram(gram_CC: Tensor, x_TC: Tensor) -> None:
    """Add ``X^T X`` of ``x_TC`` [T, C] to the lower triangle of ``gram_CC`` (``ssyrk``)."""
    tokens, columns = ctypes.c_int(x_TC.shape[0]), ctypes.c_int(x_TC.shape[1])
    one = ctypes.c_float(1.0)
    before = (_at(_LOWER), _at(_PLAIN), _at(columns), _at(tokens), _at(one), _data(x_TC), _at(columns))
    _routine(cython_blas, "ssyrk")(*before, _at(one), _data(gram_CC), _at(columns))


def _data(matrix: Tensor) -> int:
    # What is read and written there is not checked by anybody else.
    assert (matrix.is_contiguous(), matrix.dtype, matrix.device.type) == (True, torch.float32, "cpu"), matrix.dtype
    return matrix.data_ptr()


def _at(value: Any) -> int:
    return ctypes.addressof(value)


@cache
def _routine(module: Any, name: str) -> Callable[..., None]:
    """Return a Fortran routine, all of whose arguments are addresses."""
    capsule = module.__pyx_capi__[name]
    signature = ctypes.pythonapi.PyCapsule_GetName
    signature.restype, signature.argtypes = ctypes.c_char_p, [ctypes.py_object]
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    arguments = [ctypes.c_void_p] * (signature(capsule).count(b",") + 1)
    routine: Callable[..., None] = ctypes.CFUNCTYPE(None, *arguments)(pointer(capsule, signature(capsule)))
    return routine
