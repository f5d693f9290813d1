"""Make the C library give freed memory back, so that what a process is seen to hold is what it uses."""

from __future__ import annotations

import ctypes
import sys

MMAP_THRESHOLD_BYTES = 1 << 20
"""Allocations from this size on are mapped by themselves and unmapped when freed."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8


def return_freed_memory() -> None:
    """Fix glibc's thresholds, which otherwise grow with use and keep up to 32 MiB pieces in the heap; else nothing."""
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES)
        mallopt(_M_TRIM_THRESHOLD, 4 * MMAP_THRESHOLD_BYTES)
        mallopt(_M_ARENA_MAX, 2)
