"""The workers of one command: Ray, the pool, and the measurement of memory, from start to end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from billhook.cluster.environment import worker_environment
from billhook.cluster.memory import PeakMemory
from billhook.cluster.session import ray_session
from billhook.layerworkers.tasks import WorkerSetup
from billhook.orchestrator.events import Progress, Step
from billhook.orchestrator.phases import store_bytes

if TYPE_CHECKING:
    from billhook.cluster.placement import Reservation
    from billhook.cluster.pool import WorkerPool

PATIENCE_SECONDS = 60.0
"""How long to wait for room for all workers that were asked for, before those are used that there is room for."""


@dataclass(frozen=True)
class Workers:
    """How many workers, and where."""

    count: int
    threads: int
    address: str | None
    """Ray cluster to join; None starts one on this machine."""
    most: int
    """As many as are used where a cluster has room for them: at least ``count``."""
    dashboard: bool = False
    """Whether Ray, where it is started, serves its dashboard."""


@contextmanager
def ray_for(workers: Workers, device: str, progress: Progress) -> Iterator[PeakMemory]:
    """Start or join Ray and measure memory; end both again.

    Raises:
        InputError: as the session does.
    """
    gpus = workers.count if device == "cuda" else 0
    progress(Step("start", 0, 1, f"Ray with {workers.count} {device} worker{'s' if workers.count > 1 else ''}"))
    cpus = workers.count * workers.threads
    session = ray_session(
        *(workers.address, cpus, gpus, store_bytes(workers.count), worker_environment(workers.threads)),
        dashboard=workers.dashboard,
    )
    with session as dashboard, PeakMemory() as memory:
        if dashboard is not None:
            told = f"Ray's dashboard is at {dashboard.url}; it asks for the token in {dashboard.token_file}"
            progress(Step("start", 0, 1, told))
        yield memory


def reserve_places(workers: Workers, device: str, enough: int, patience_seconds: float) -> Reservation:
    """Reserve places on the Ray that :func:`ray_for` has started or joined; see :func:`placement.reserve`."""
    from billhook.cluster.placement import Share, reserve  # imports ray, which must see the session's environment

    return reserve(workers.most, enough, Share(workers.threads, 1 if device == "cuda" else 0), patience_seconds)


def start_pool(
    setup: WorkerSetup,
    places: Reservation,
    deadline: Callable[[], float | None] = lambda: None,
    expected: Mapping[str, str] | None = None,
    heard: Callable[[Mapping[int, tuple[float, str]]], None] = lambda beats: None,
) -> WorkerPool:
    """Start workers at places that were reserved; see :class:`WorkerPool`."""
    from billhook.cluster.pool import WorkerPool

    return WorkerPool(setup, places, deadline, expected, heard)
