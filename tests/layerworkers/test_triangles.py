"""Triangles arrive as they were sent, to the last bit, and nothing else is sent."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from billhook.layerworkers.collective import Counted
from billhook.layerworkers.stopwatch import Stopwatch
from billhook.layerworkers.triangles import broadcast_symmetric_, broadcast_upper_, lower, pack, unpack, upper


@pytest.mark.parametrize("triangle", [lower, upper])
def test_a_band_comes_back_with_zeros_outside_the_triangle(triangle: Any) -> None:
    a = torch.randn(9, 9)
    band = a[3:7]
    packed = pack(band, 3, triangle)
    expected = (a.tril() if triangle is lower else a.triu())[3:7]
    assert packed.size == sum(4 + row if triangle is lower else 6 - row for row in range(4))
    assert torch.equal(unpack(packed, band.shape, 3, triangle), expected)


@pytest.mark.parametrize("band_bytes", [1000, 16 << 20])
@pytest.mark.parametrize("kind", ["upper", "symmetric"])
def test_a_broadcast_gives_everyone_the_roots_bits(
    run_group: Any, kind: str, band_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("billhook.layerworkers.scratch.BAND_BYTES", band_bytes)
    torch.manual_seed(0)
    a = torch.randn(70, 70)
    a = a.triu() if kind == "upper" else a + a.T
    a[5, 5] = torch.inf
    counts: list[int] = []

    def work(group: Any) -> torch.Tensor:
        own = a.clone() if group.rank == 1 else torch.full_like(a, torch.nan)
        send = broadcast_upper_ if kind == "upper" else broadcast_symmetric_
        send(Counted(group, counts.append, Stopwatch()), 1, own)
        return own

    for received in run_group(3, work):
        assert torch.equal(received.view(torch.int32), a.view(torch.int32))
    assert sum(counts) == 2 * 4 * 70 * 71 // 2
