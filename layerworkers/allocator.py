"""Make the C library give freed memory back, so that what a process is seen to hold is what it uses.

Both functions do nothing where the C library is not glibc.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

MMAP_THRESHOLD_BYTES = 4 << 20
"""Allocations from this size on are mapped by themselves and unmapped when freed: each time the system fills them with
zeros, which for the activations of small models is time that shows."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8


def return_large_blocks() -> None:
    """From now on unmap large pieces of memory when they are freed: glibc's thresholds otherwise grow with use."""
    mallopt = _glibc("mallopt")
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES)
        mallopt(_M_TRIM_THRESHOLD, 4 * MMAP_THRESHOLD_BYTES)
        mallopt(_M_ARENA_MAX, 2)


def return_free_pages() -> None:
    """Give back the free pages between small pieces that are in use: without it a heap grows from block to block."""
    malloc_trim = _glibc("malloc_trim")
    if malloc_trim is not None:
        malloc_trim(0)


def _glibc(name: str) -> Any:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
