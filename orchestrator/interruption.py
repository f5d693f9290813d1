"""Ending a run when the system asks for it: finish or abandon the block in progress, keep what is done."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from billhook.cluster.session import end_own_session

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""Ctrl-C; the end of a pod or job; the end of a terminal; a scheduler's warning, as of Slurm's ``--signal=USR1``."""

GRACE_SECONDS = 10.0
"""How long the block in progress may still take, unless said otherwise."""


class Interruption:
    """Whether a run was asked to end.

    While blocks are pruned that is looked up (:meth:`deadline`); at any other time it raises KeyboardInterrupt.
    """

    def __init__(self, grace_seconds: float = GRACE_SECONDS):
        self._grace_seconds = grace_seconds
        self._asked_at: float | None = None
        self._polled = False

    @property
    def asked(self) -> bool:
        """Whether the run was asked to end."""
        return self._asked_at is not None

    @property
    def is_polled(self) -> bool:
        """Whether blocks are pruned now, so that asking to end raises nothing."""
        return self._polled

    def deadline(self) -> float | None:
        """Return the monotonic time at which the block in progress is abandoned; None: not asked to end."""
        return None if self._asked_at is None else self._asked_at + self._grace_seconds

    @contextmanager
    def polled(self) -> Iterator[None]:
        """Raise nothing meanwhile: the caller asks."""
        self._polled = True
        try:
            yield
        finally:
            self._polled = False

    def ask(self) -> None:
        """Ask the run to end."""
        self._asked_at = time.monotonic()
        if not self._polled:
            raise KeyboardInterrupt


def is_ignored(number: signal.Signals) -> bool:
    """Whether this process was started to ignore a signal, as by nohup."""
    return signal.getsignal(number) == signal.SIG_IGN


@contextmanager
def interruptible(grace_seconds: float) -> Iterator[Interruption]:
    """Let the first of :data:`SIGNALS` ask the run to end, and the second end this process at once with code 130."""
    interruption = Interruption(grace_seconds)

    def handle(number: int, frame: FrameType | None) -> None:
        if interruption.asked:
            end_own_session()
            os._exit(130)
        if interruption.is_polled:
            told = f"billhook: ending; the block in progress has {grace_seconds:g} s to finish; again to end at once\n"
            os.write(2, told.encode())
        interruption.ask()

    before = {number: signal.signal(number, handle) for number in SIGNALS if not is_ignored(number)}
    try:
        yield interruption
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
