"""Make the C library give freed memory back, so that what a process is seen to hold is what it uses.

Nothing here has an effect where the C library is not glibc.
"""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Any

MMAP_THRESHOLD_BYTES = 4 << 20
"""Allocations from this size on are mapped by themselves and unmapped when freed: each time the system fills them with
zeros, which for the activations of small models is time that shows."""

_LARGE_PAGES = "glibc.malloc.hugetlb=1"
"""Advise the system to use them, where that is what it waits for."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8


def large_pages() -> dict[str, str]:
    """Return what to put into the environment of a process for its large pieces to be made of large pages, if it may.

    A piece that is mapped anew costs a fault for each of its pages: with pages of 4 KiB, a good part of a forward pass.
    """
    given = os.environ.get("GLIBC_TUNABLES")
    return {"GLIBC_TUNABLES": f"{given}:{_LARGE_PAGES}" if given else _LARGE_PAGES}


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
