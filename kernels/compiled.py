"""Loops compiled for the CPU on first use: GPU workers never pay for it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


@functools.cache
def compiled(loop: Callable[..., None]) -> Any:
    """Return ``loop``, a function of numpy arrays and numbers, compiled by numba; the code is cached on disk.

    Floating-point operations keep their order and are not fused: the same bits for the same inputs.
    """
    import numba

    try:
        return numba.njit(nogil=True, cache=True, error_model="numpy")(loop)
    except RuntimeError:  # there is no folder that the cache could be written to
        return numba.njit(nogil=True, error_model="numpy")(loop)
