"""The workers of one command: Ray, the pool, and the measurement of memory, from start to end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from billhook.cluster.memory import PeakMemory
from billhook.cluster.session import ray_session
from billhook.layerworkers.tasks import WorkerSetup
from billhook.orchestrator.phases import store_bytes

if TYPE_CHECKING:
    from billhook.cluster.pool import WorkerPool

Progress = Callable[[str, int, int, str], None]
"""``progress(phase, done, total, message)``."""


def no_progress(phase: str, done: int, total: int, message: str) -> None:
    """Report nothing."""


@dataclass(frozen=True)
class Workers:
    """How many workers, and where."""

    count: int
    threads: int
    address: str | None
    """Ray cluster to join; None starts one on this machine."""


@contextmanager
def worker_pool(
    setup: WorkerSetup,
    workers: Workers,
    progress: Progress,
    deadline: Callable[[], float | None] = lambda: None,
    expected: Mapping[str, str] | None = None,
) -> Iterator[tuple[WorkerPool, PeakMemory]]:
    """Start or join Ray and start the workers; end all of it again.

    deadline, expected: see :class:`WorkerPool`.

    Raises:
        InputError, RunError: as the session and the pool do.
    """
    gpus = workers.count if setup.device == "cuda" else 0
    progress("start", 0, 1, f"Ray with {workers.count} {setup.device} worker{'s' if workers.count > 1 else ''}")
    cpus = workers.count * workers.threads
    with ray_session(workers.address, cpus, gpus, store_bytes(workers.count)), PeakMemory() as memory:
        from billhook.cluster.pool import WorkerPool  # imports ray, which must see the session's environment

        with WorkerPool(setup, workers.count, deadline, expected) as pool:
            yield pool, memory
