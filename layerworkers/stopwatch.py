"""What a worker's time is spent on: every moment belongs to one part."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

PARTS = ("forward", "statistics", "factors", "solving", "moving", "files")
"""``forward`` is what is none of the others, ``moving`` includes waiting for others, ``files`` is waiting only."""


class Stopwatch:
    """Adds up the seconds of each part since it was made, or last read.

    A GPU computes on while its host goes to the next part: its seconds are counted where the host waits for it.
    """

    def __init__(self) -> None:
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._part, self._since = PARTS[0], time.monotonic()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time of the context to ``name``, but for what a context within it counts to another part."""
        outer = self._part
        self._turn_to(name)
        try:
            yield
        finally:
            self._turn_to(outer)

    @property
    def current(self) -> str:
        """The part that the time now belongs to."""
        return self._part

    def read(self) -> dict[str, float]:
        """Return the seconds by part, and begin again."""
        self._turn_to(self._part)
        seconds, self._seconds = self._seconds, dict.fromkeys(PARTS, 0.0)
        return seconds

    def _turn_to(self, name: str) -> None:
        now = time.monotonic()
        self._seconds[self._part] += now - self._since
        self._part, self._since = name, now
