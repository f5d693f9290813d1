"""What is counted as moved between workers."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from billhook.layerworkers import collective
from billhook.layerworkers.collective import (
    Alone,
    Counted,
    all_gather,
    broadcast,
    broadcast_bands,
    broadcast_tensor_,
    gather_rows_,
    messages,
)
from billhook.layerworkers.stopwatch import Stopwatch


def test_arrays_to_others_count_once_for_each_receiver(run_group: Any) -> None:
    array = np.zeros(25, dtype=np.float32)

    def work(group: Any) -> list[int]:
        counts: list[int] = []
        counted = Counted(group, counts.append, Stopwatch())
        all_gather(counted, {"numbers": [array, array[:5]], "name": "not counted"})
        broadcast(counted, 1, array if counted.rank == 1 else None)
        counted.exchange({2: (1, array)})
        if counted.rank != 0:
            broadcast_tensor_(counted.subgroup([1, 2]), 0, torch.zeros(7, dtype=torch.bfloat16))
        return counts

    assert run_group(3, work) == [[240, 0, 100], [240, 200, 100, 14], [240, 0, 0, 0]]


def test_what_goes_to_oneself_does_not_count() -> None:
    counts: list[int] = []
    array = np.zeros(3)
    assert all_gather(Counted(Alone(), counts.append, Stopwatch()), array) == [array]
    assert counts == [0]


@pytest.mark.parametrize("band_bytes", [20, 16 << 20])
@pytest.mark.parametrize("bounds", [(0, 2, 9, 9, 11), (0, 0, 0, 11, 11)])
@pytest.mark.parametrize("few", [False, True])
def test_all_ranks_get_the_rows_of_all_others(
    run_group: Any, band_bytes: int, bounds: tuple[int, ...], few: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("billhook.layerworkers.scratch.BAND_BYTES", band_bytes)
    monkeypatch.setattr(collective, "are_passed_on", lambda dealt: few)
    dealt = [(0, 0), (0, 0), (0, 5), (5, 5)]
    ranges = [list(pairwise(bounds)), dealt]
    whole = [torch.randn(11, 3).bfloat16(), torch.randn(5, 2)]

    def work(group: Any) -> list[torch.Tensor]:
        own = [torch.zeros_like(tensor) for tensor in whole]
        for tensor, received, of_tensor in zip(whole, own, ranges, strict=True):
            start, stop = of_tensor[group.rank]
            received[start:stop] = tensor[start:stop]
        gather_rows_(group, own, ranges)
        return own

    for received in run_group(4, work):
        assert all(map(torch.equal, received, whole))


def test_small_tensors_travel_together_and_large_ones_in_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("billhook.layerworkers.scratch.BAND_BYTES", 100)
    assert messages([((5, 10), 1), ((5, 10), 1), ((0, 10), 1), ((12, 10), 1), ((1, 500), 1)]) == [
        [(0, 0, 5), (1, 0, 5)],
        [(3, 0, 10)],
        [(3, 10, 12)],
        [(4, 0, 1)],
    ]


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [0, 1, 3, 4, 9])
def test_bands_reach_every_rank_in_order_and_no_connection_carries_them_often(
    run_group: Any, size: int, count: int
) -> None:
    root = size // 2
    bands = [np.full(10 + number, number, dtype=np.uint8) for number in range(count)]

    def work(group: Any) -> tuple[list[Any], int]:
        counts: list[int] = []
        taken: list[Any] = []
        counted = Counted(group, counts.append, Stopwatch())
        broadcast_bands(counted, root, count, bands.__getitem__, lambda number, band: taken.append((number, band)))
        return taken, sum(counts)

    results = run_group(size, work)
    for rank, (taken, sent_bytes) in enumerate(results):
        if rank == root:
            assert taken == []
        else:
            assert [number for number, _ in taken] == list(range(count))
            assert all(np.array_equal(band, bands[number]) for number, band in taken)
        assert sent_bytes <= sum(band.nbytes for band in bands) + max(0, size - 2) * 20
    assert sum(sent for _, sent in results) == (size - 1) * sum(band.nbytes for band in bands)
