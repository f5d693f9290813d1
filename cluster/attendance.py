"""The actor that knows which workers are alive and what they have synced: it imports neither torch nor numpy, so its
process stays small."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict

import ray


@ray.remote(num_cpus=0)
class Attendance:
    """Counts who has synced what, and knows when each rank was last heard of."""

    def __init__(self) -> None:
        self._synced: dict[int, int] = defaultdict(int)
        self._more_synced = asyncio.Condition()
        self._heard: dict[int, tuple[float, str]] = {}

    async def beat(self, rank: int, doing: str) -> None:
        """Note that ``rank`` is alive, and what it does."""
        self._heard[rank] = time.monotonic(), doing

    async def heard(self) -> dict[int, tuple[float, str]]:
        """Return, of each rank that was ever heard of, how many seconds ago it was, and what it did."""
        now = time.monotonic()
        return {rank: (now - at, doing) for rank, (at, doing) in sorted(self._heard.items())}

    async def synced(self, block: int) -> None:
        """Note that one more worker has its share of ``block`` on the disk."""
        async with self._more_synced:
            self._synced[block] += 1
            self._more_synced.notify_all()

    async def all_synced(self, block: int, size: int) -> None:
        """Return once ``size`` workers have their share of ``block`` on the disk."""
        async with self._more_synced:
            await self._more_synced.wait_for(lambda: self._synced[block] >= size)
            del self._synced[block]
