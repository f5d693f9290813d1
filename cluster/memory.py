"""Peak memory of a run on this node: the sum over its processes, sampled while it goes on."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from billhook.cluster.session import marked_processes

SAMPLE_SECONDS = 0.05
RESCAN_SECONDS = 2.0
"""How often processes are looked for, and their shares of shared pages are asked for, which takes milliseconds."""

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class PeakMemory:
    """Samples the proportional set sizes of this process and of its Ray session's; a context manager.

    Shared pages count once over all processes. A process's own pages are read at every sample; its share of shared
    pages every two seconds, and until then every page that it maps in addition counts in full. Where the system tells
    no proportional sizes, nothing is measured.
    """

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="peak-memory", daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        scanned = float("-inf")
        processes: list[_Process] = []
        while True:
            if time.monotonic() - scanned > RESCAN_SECONDS:
                scanned = time.monotonic()
                processes = [found for pid in (os.getpid(), *marked_processes()) if (found := _examine(pid))]
            self.peak_bytes = max(self.peak_bytes, sum(process.size_bytes() for process in processes))
            if self._stop.wait(SAMPLE_SECONDS):
                return


def proportional_bytes(pid: int) -> int:
    """Return the proportional set size of a process; 0 where it cannot be told (it ended, or is not ours)."""
    process = _examine(pid)
    return process.size_bytes() if process is not None else 0


def own_bytes(pid: int) -> int:
    """Return the bytes of a process that no other shares; 0 where they cannot be told."""
    pages = _pages(pid)
    return _PAGE_BYTES * (pages[0] - pages[1]) if pages is not None else 0


@dataclass(frozen=True)
class _Process:
    pid: int
    share_bytes: int
    """Its share of the pages that it shared when it was examined."""
    shared_pages: int
    """How many these were."""

    def size_bytes(self) -> int:
        pages = _pages(self.pid)
        if pages is None:
            return 0
        resident, shared = pages
        return self.share_bytes + _PAGE_BYTES * (resident - shared + max(0, shared - self.shared_pages))


def _examine(pid: int) -> _Process | None:
    pages = _pages(pid)
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    except OSError:
        return None
    sizes = {name: int(value.split()[0]) * 1024 for name, _, value in (line.partition(":") for line in lines)}
    if pages is None or "Pss" not in sizes:
        return None
    anonymous = sizes.get("Pss_Anon", sizes["Pss"])
    return _Process(pid, sizes["Pss"] - anonymous, pages[1])


def _pages(pid: int) -> tuple[int, int] | None:
    """Return the resident pages of a process, and those of them that are files' or shared."""
    try:
        fields = Path(f"/proc/{pid}/statm").read_text().split()
    except OSError:
        return None
    return int(fields[1]), int(fields[2])
