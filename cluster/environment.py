"""What the environment of a worker's process must say from its begin."""

from __future__ import annotations

from billhook.layerworkers.allocator import large_pages

IDLE_THREADS_SLEEP = {"OPENBLAS_THREAD_TIMEOUT": "4"}
"""Environment in which SciPy's threads sleep at once when they have nothing to do. They would spin for some 25 ms, on
the cores on which torch's threads, which take turns with them, want to work: a forward pass took twice its time."""


def worker_environment(threads: int) -> dict[str, str]:
    """Return the environment variables of a worker that computes with ``threads`` threads."""
    libraries = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
    return {name: str(threads) for name in libraries} | large_pages() | IDLE_THREADS_SLEEP
