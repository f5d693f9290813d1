"""Several workers in one process: one thread each, meeting at a barrier."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

RunGroup = Callable[[int, Callable[[Any], Any]], list[Any]]


class ThreadCollective:
    """The collective over threads: what Ray does over processes."""

    def __init__(self, shared: dict[Any, Any], lock: threading.Condition, members: Sequence[int], me: int):
        self._shared, self._lock, self._members, self._me = shared, lock, tuple(members), me
        self._count = 0
        self._subgroups: dict[tuple[int, ...], ThreadCollective] = {}

    @property
    def rank(self) -> int:
        return self._members.index(self._me)

    @property
    def size(self) -> int:
        return len(self._members)

    def subgroup(self, ranks: Sequence[int]) -> ThreadCollective:
        members = tuple(self._members[rank] for rank in ranks)
        if members == self._members:
            return self
        if members not in self._subgroups:
            self._subgroups[members] = ThreadCollective(self._shared, self._lock, members, self._me)
        return self._subgroups[members]

    def exchange(self, outgoing: Mapping[int, Any]) -> dict[int, Any]:
        self._count += 1
        key = (self._members, self._count)
        with self._lock:
            posted = self._shared.setdefault(key, {})
            posted[self.rank] = dict(outgoing)
            self._lock.notify_all()
            assert self._lock.wait_for(lambda: len(posted) == self.size, timeout=20), f"{key}: nobody else came"
        return {sender: posted[sender][self.rank] for sender in range(self.size) if self.rank in posted[sender]}


@pytest.fixture
def run_group() -> RunGroup:
    """Return a function that runs ``work(collective)`` on so many workers and returns the results by rank."""

    def run(size: int, work: Callable[[Any], Any]) -> list[Any]:
        shared: dict[Any, Any] = {}
        lock = threading.Condition()
        results: list[Any] = [None] * size
        errors: list[BaseException] = []

        def one(rank: int) -> None:
            import torch

            torch.set_num_threads(1)
            try:
                results[rank] = work(ThreadCollective(shared, lock, range(size), rank))
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return results

    return run
