from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from billhook.cluster.memory import own_bytes, proportional_bytes

MIB = 1 << 20


GROWTH = """
import mmap, sys, time
import torch
from billhook.cluster.memory import PeakMemory

MIB = 1 << 20

def until(condition):
    end = time.monotonic() + 20
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)

with PeakMemory() as memory:
    until(lambda: memory.peak_bytes > 0)
    before = memory.peak_bytes
    with open(sys.argv[1], "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert sum(mapped[:: mmap.PAGESIZE]) == 0
        until(lambda: memory.peak_bytes >= before + 95 * MIB)
    print((memory.peak_bytes - before) // MIB)
with PeakMemory() as memory:
    until(lambda: memory.peak_bytes > 0)
    before = memory.peak_bytes
    block = torch.ones(300 * MIB, dtype=torch.uint8)
    until(lambda: memory.peak_bytes >= before + 250 * MIB)
    del block
    time.sleep(0.2)
    print((memory.peak_bytes - before) // MIB)
"""
"""Run in a process of its own, whose memory nothing else makes grow or shrink."""


def test_what_is_held_for_a_moment_is_seen_and_stays_the_peak_and_so_are_mapped_pages_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(100 * MIB))
    command = [sys.executable, "-c", GROWTH, str(tmp_path / "file")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    mapped, held = map(int, done.stdout.split())
    assert 95 <= mapped <= 150
    assert 250 <= held <= 400


def test_what_cannot_be_told_counts_nothing() -> None:
    assert proportional_bytes(2**22 + 1) == own_bytes(2**22 + 1) == 0
    assert proportional_bytes(os.getpid()) >= own_bytes(os.getpid()) > 50 * MIB
