"""The collective over Ray: the same contract as in one process."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import ray
from ray import cloudpickle
from ray.exceptions import RayActorError, RayError

from billhook.cluster import exchange
from billhook.cluster.exchange import Envelope, Inbox, RayCollective
from billhook.cluster.lines import Lines
from billhook.layerworkers.collective import all_gather, broadcast

# Ray's workers need not find this file.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


class Member:
    def __init__(self) -> None:
        self.inbox = Inbox()
        self.lines = Lines(self.inbox.put_parts, self.inbox.lose)

    @ray.method(concurrency_group="mail")
    def post(self, key: Any, references: list[Any], *body: bytes) -> None:
        self.inbox.put(key, Envelope(b"".join(body), references))

    def door(self) -> Any:
        return self.lines.door

    def script(
        self, members: list[Any], rank: int, doors: dict[int, Any], inline_bytes: int, piece_bytes: int
    ) -> list[Any]:
        exchange.INLINE_BYTES, exchange.PIECE_BYTES = inline_bytes, piece_bytes
        self.lines.connect({other: door for other, door in doors.items() if other != rank})
        self.group = RayCollective(members, self.inbox, range(len(members)), rank, self.lines)
        big = np.full((rank + 1, 30_000), rank, dtype=np.float32)  # of different sizes, all above an argument's
        gathered = all_gather(self.group, {"rank": rank, "big": big, "small": np.arange(rank)})
        results: list[Any] = [
            [(each["rank"], each["big"].shape, float(each["big"].sum()), each["small"].tolist()) for each in gathered]
        ]
        results.append(float(broadcast(self.group, 1, big * 10).sum()))
        results.append([float(each.sum()) for each in self.group.exchange({2: big}).values()])
        if rank != 1:
            pair = self.group.subgroup([0, 2])
            assert pair is self.group.subgroup([0, 2])
            results.append((pair.rank, pair.size, all_gather(pair, f"from {rank}")))
        return results


@pytest.mark.parametrize(("inline_bytes", "piece_bytes"), [(1 << 10, 50_000), (1 << 10, 64 << 20), (1 << 20, 1)])
@pytest.mark.parametrize("neighbours", [[], [0, 2], [0, 1, 2]])
def test_messages_arrive_whole_and_in_rank_order(
    ray_cluster: None, inline_bytes: int, piece_bytes: int, neighbours: list[int]
) -> None:
    actor = ray.remote(num_cpus=1, concurrency_groups={"mail": 1})(Member)
    members = [actor.remote() for rank in range(3)]
    doors = {rank: ray.get(members[rank].door.remote()) for rank in neighbours}
    calls = [
        each.script.remote(members, rank, doors if rank in doors else {}, inline_bytes, piece_bytes)
        for rank, each in enumerate(members)
    ]
    results = ray.get(calls, timeout=60)
    for member in members:
        ray.kill(member)
    for rank, result in enumerate(results):
        assert result[0] == [(r, (r + 1, 30_000), 30_000.0 * r * (r + 1), list(range(r))) for r in range(3)]
        assert result[1] == 600_000.0
        assert result[2] == ([0.0, 60_000.0, 180_000.0] if rank == 2 else [])
        if rank != 1:
            assert result[3] == (0 if rank == 0 else 1, 2, ["from 0", "from 2"])


def test_a_group_of_one_needs_nobody() -> None:
    assert RayCollective([], Inbox(), [4], 4).exchange({0: "to myself"}) == {0: "to myself"}


def test_a_worker_that_cannot_be_reached_is_told_of(ray_cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "LOOK_SECONDS", 0.1)
    other = ray.remote(num_cpus=0, concurrency_groups={"mail": 1})(Member).remote()
    ray.get(other.__ray_ready__.remote())
    ray.kill(other)
    with suppress(RayActorError):  # it takes its time to die, and may take in a last message
        while True:
            ray.get(other.__ray_ready__.remote())
    with pytest.raises(RayError):
        RayCollective([None, other], Inbox(), [0, 1], 0).exchange({1: "to nobody"})
    inbox = Inbox()
    inbox.put(((0, 1), 1, 1), Envelope())  # the other's message came before it died

    def both() -> None:
        group = RayCollective([None, other], inbox, [0, 1], 0)
        group.exchange({1: "to nobody"})
        group.settle()

    with pytest.raises(RayError):
        both()
