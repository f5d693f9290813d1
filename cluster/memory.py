"""Peak memory of a run on this node: the sum over its processes, sampled while it goes on."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

from billhook.cluster.session import marked_processes

SAMPLE_SECONDS = 1.0
RESCAN_SECONDS = 3.0


class PeakMemory:
    """Samples the proportional set sizes of this process and of its Ray session's; a context manager.

    Shared pages count once over all processes. Where the system tells no proportional sizes, nothing is measured.
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
        scanned, processes = 0.0, [os.getpid()]
        while True:
            if time.monotonic() - scanned > RESCAN_SECONDS:
                scanned, processes = time.monotonic(), [os.getpid(), *marked_processes()]
            self.peak_bytes = max(self.peak_bytes, sum(proportional_bytes(pid) for pid in processes))
            if self._stop.wait(SAMPLE_SECONDS):
                return


def proportional_bytes(pid: int) -> int:
    """Return the proportional set size of a process; 0 where it cannot be told (it ended, or is not ours)."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0
