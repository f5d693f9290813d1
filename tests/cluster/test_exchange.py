"""The collective over Ray: the same contract as in one process."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import ray

from billhook.cluster import exchange
from billhook.cluster.exchange import RayCollective
from billhook.cluster.mailbox import Mailbox
from billhook.layerworkers.collective import all_gather, broadcast, gather_to


class Member:
    def __init__(self, mailbox: Any, rank: int, size: int):
        self.group = RayCollective(mailbox, range(size), rank)

    def script(self, piece_bytes: int) -> list[Any]:
        exchange.PIECE_BYTES = piece_bytes
        rank = self.group.rank
        big = np.full((rank + 1, 30_000), rank, dtype=np.float32)  # above the inline limit, of different sizes
        gathered = all_gather(self.group, {"rank": rank, "big": big, "small": np.arange(rank)})
        results: list[Any] = [
            [(each["rank"], each["big"].shape, float(each["big"].sum()), each["small"].tolist()) for each in gathered]
        ]
        results.append(float(broadcast(self.group, 1, big * 10).sum()))
        results.append([float(each.sum()) for each in gather_to(self.group, 2, big)])
        if rank != 1:
            pair = self.group.subgroup([0, 2])
            assert pair is self.group.subgroup([0, 2])
            results.append((pair.rank, pair.size, all_gather(pair, f"from {rank}")))
        return results


@pytest.mark.parametrize("piece_bytes", [50_000, 64 << 20])
def test_messages_arrive_whole_and_in_rank_order(ray_cluster: None, piece_bytes: int) -> None:
    mailbox: Any = Mailbox.remote()  # type: ignore[attr-defined]
    actor = ray.remote(num_cpus=1)(Member)
    members = [actor.remote(mailbox, rank, 3) for rank in range(3)]
    results = ray.get([member.script.remote(piece_bytes) for member in members], timeout=60)
    for rank, result in enumerate(results):
        assert result[0] == [(r, (r + 1, 30_000), 30_000.0 * r * (r + 1), list(range(r))) for r in range(3)]
        assert result[1] == 600_000.0
        assert result[2] == ([0.0, 60_000.0, 180_000.0] if rank == 2 else [])
        if rank != 1:
            assert result[3] == (0 if rank == 0 else 1, 2, ["from 0", "from 2"])


def test_a_group_of_one_needs_no_mailbox() -> None:
    assert RayCollective(None, [4], 4).exchange({0: "to myself"}) == {0: "to myself"}
