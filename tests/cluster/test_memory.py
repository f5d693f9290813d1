from __future__ import annotations

import mmap
import os
import time
from pathlib import Path

import torch

from billhook.cluster.memory import PeakMemory, own_bytes, proportional_bytes

MIB = 1 << 20


def test_a_peak_of_a_tenth_of_a_second_is_seen() -> None:
    with PeakMemory() as memory:
        time.sleep(0.2)
        before = memory.peak_bytes
        block = torch.ones(300 * MIB, dtype=torch.uint8)
        time.sleep(0.15)
        del block
        time.sleep(0.1)
    assert 290 * MIB <= memory.peak_bytes - before <= 340 * MIB


def test_pages_of_a_file_count_as_soon_as_they_are_mapped(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(100 * MIB))
    with PeakMemory() as memory:
        time.sleep(0.2)
        before = memory.peak_bytes
        with (tmp_path / "file").open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            assert sum(mapped[:: mmap.PAGESIZE]) == 0
            time.sleep(0.2)
    assert memory.peak_bytes - before >= 95 * MIB


def test_what_cannot_be_told_counts_nothing() -> None:
    assert proportional_bytes(2**22 + 1) == own_bytes(2**22 + 1) == 0
    assert proportional_bytes(os.getpid()) >= own_bytes(os.getpid()) > 50 * MIB
