"""How long workers take to exchange messages, by size: what ``layerworkers/sharing.py`` assumes.

    python benchmarks/exchange.py [--workers 2] [--rounds 100]

Prints the median milliseconds of an exchange in which every worker sends one array to all others.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import numpy as np
import ray

from billhook.cluster.exchange import Envelope, Inbox, Key, RayCollective
from billhook.cluster.lines import Door, Lines
from billhook.cluster.session import ray_session
from billhook.layerworkers.collective import all_gather

SIZES_BYTES = (0, 32 << 10, 256 << 10, 1 << 20, 9 << 20)


class Member:
    """A worker that does nothing else."""

    def __init__(self) -> None:
        self._inbox = Inbox()
        self._lines = Lines(self._inbox.put_parts, self._inbox.lose)

    @ray.method(concurrency_group="mail")
    def post(self, key: Key, references: list[Any], *body: bytes) -> None:
        """Take in what another sends."""
        self._inbox.put(key, Envelope(b"".join(body), references))

    def door(self) -> Door | None:
        """Return where the others reach it."""
        return self._lines.door

    def measure(self, actors: list[Any], rank: int, doors: dict[int, Door], rounds: int) -> dict[int, float]:
        """Return the median seconds of each size."""
        self._lines.connect({other: door for other, door in doors.items() if other != rank})
        group = RayCollective(actors, self._inbox, range(len(actors)), rank, self._lines)
        medians = {}
        for size_bytes in SIZES_BYTES:
            array, seconds = np.zeros(size_bytes, dtype=np.uint8), []
            for _ in range(rounds):
                begin = time.perf_counter()
                all_gather(group, array)
                seconds.append(time.perf_counter() - begin)
            medians[size_bytes] = statistics.median(seconds)
        return medians


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=100)
    arguments = parser.parse_args()
    with ray_session(None, arguments.workers, 0, 200 << 20):
        actor: Any = ray.remote(concurrency_groups={"mail": 1})(Member)  # type: ignore[call-overload]
        actors = [actor.remote() for _ in range(arguments.workers)]
        for way, doors in (("calls", {}), ("lines", dict(enumerate(ray.get([each.door.remote() for each in actors]))))):
            calls = [each.measure.remote(actors, rank, doors, arguments.rounds) for rank, each in enumerate(actors)]
            for size_bytes, seconds in ray.get(calls[0]).items():
                print(f"{way}: {size_bytes / 1024:8.0f} KiB to each: {1000 * seconds:6.2f} ms")


if __name__ == "__main__":
    main()
