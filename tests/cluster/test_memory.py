from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

from billhook.cluster.memory import PeakMemory, own_bytes, proportional_bytes

MIB = 1 << 20


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait until it holds, for as long as a busy machine may take."""
    end = time.monotonic() + 20
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)


def test_what_is_held_for_a_moment_is_seen_and_stays_the_peak() -> None:
    with PeakMemory() as memory:
        wait_until(lambda: memory.peak_bytes > 0)
        before = memory.peak_bytes
        block = torch.ones(300 * MIB, dtype=torch.uint8)
        wait_until(lambda: memory.peak_bytes >= before + 250 * MIB)
        del block
        time.sleep(0.2)
    assert 250 * MIB <= memory.peak_bytes - before <= 400 * MIB


def test_pages_of_a_file_count_as_soon_as_they_are_mapped(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(100 * MIB))
    with PeakMemory() as memory:
        wait_until(lambda: memory.peak_bytes > 0)
        before = memory.peak_bytes
        with (tmp_path / "file").open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            assert sum(mapped[:: mmap.PAGESIZE]) == 0
            wait_until(lambda: memory.peak_bytes >= before + 95 * MIB)
    assert memory.peak_bytes - before >= 95 * MIB


def test_what_cannot_be_told_counts_nothing() -> None:
    assert proportional_bytes(2**22 + 1) == own_bytes(2**22 + 1) == 0
    assert proportional_bytes(os.getpid()) >= own_bytes(os.getpid()) > 50 * MIB
