"""Threads of SciPy's BLAS, where they are not safe."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

LARGEST_THREADED = 16384
"""Columns up to which products and factorisations of square matrices use all threads.

OpenBLAS 0.3, as SciPy brings it, crashes in ``ssyrk`` and ``spotrf`` on 28,672 columns with two threads, and does not
with one.
"""


def safe_threads(columns: int) -> AbstractContextManager[Any]:
    """Return a context in which SciPy may work on a matrix of so many rows and columns."""
    if columns <= LARGEST_THREADED:
        return nullcontext()
    context: AbstractContextManager[Any] = _controller().limit(limits=1, user_api="blas")
    return context


@cache
def _controller() -> Any:
    from scipy.linalg import blas  # noqa: F401 - only what is loaded by now is found
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController().select(internal_api="openblas")
