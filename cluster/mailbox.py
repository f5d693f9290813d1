"""The actor that all workers of a pool meet at: it imports neither torch nor numpy, so its process stays small."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from typing import Any

import ray

Envelope = tuple[bytes, list[Any]]
"""A message that only its receiver opens, and references to the objects in Ray's store that belong to it."""


@ray.remote(num_cpus=0)
class Mailbox:
    """Holds each exchange's messages until all ranks of its group have posted theirs.

    It also counts who has synced what, and knows when each rank was last heard of.
    """

    def __init__(self) -> None:
        self._exchanges: dict[Any, _Exchange] = defaultdict(_Exchange)
        self._synced: dict[int, int] = defaultdict(int)
        self._more_synced = asyncio.Condition()
        self._heard: dict[int, float] = {}

    async def beat(self, rank: int) -> None:
        """Note that ``rank`` is alive."""
        self._heard[rank] = time.monotonic()

    async def silent(self, seconds: float) -> list[int]:
        """Return the ranks that were heard of, but not within the last ``seconds``."""
        now = time.monotonic()
        return [rank for rank, at in self._heard.items() if now - at > seconds]

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

    async def exchange(self, key: Any, rank: int, size: int, outgoing: dict[int, Envelope]) -> dict[int, Envelope]:
        """Post ``outgoing`` (by receiving rank); return the messages to ``rank`` once all have posted."""
        exchange = self._exchanges[key]
        exchange.posted[rank] = outgoing
        if len(exchange.posted) == size:
            exchange.complete.set()
        await exchange.complete.wait()
        exchange.collected += 1
        if exchange.collected == size:
            del self._exchanges[key]
        return {sender: exchange.posted[sender][rank] for sender in range(size) if rank in exchange.posted[sender]}


class _Exchange:
    def __init__(self) -> None:
        self.posted: dict[int, dict[int, Envelope]] = {}
        self.complete = asyncio.Event()
        self.collected = 0
