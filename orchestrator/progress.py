"""Progress on standard error: a live bar on a terminal, one plain line per step elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from billhook.orchestrator.workers import Progress

_LABELS = {
    "plan": "plan",
    "allocate": "allocating",
    "start": "starting",
    "replay": "replaying",
    "prune": "pruning",
    "lost": "lost",
    "copy": "copying",
    "finish": "finishing",
    "eval": "evaluating",
}


_BY_BLOCK = ("prune", "replay", "eval", "lost", "allocate")


@contextmanager
def shown_progress() -> Iterator[Progress]:
    """Yield a progress callback that a person can follow."""
    if not sys.stderr.isatty():
        yield _print_line
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with RichProgress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task("starting", total=None)

        def update(phase: str, done: int, total: int, message: str) -> None:
            bar.update(task, description=_LABELS[phase], completed=done, total=total)
            if message:
                bar.console.print(f"{_step(phase, done, total)}: {message}", highlight=False, markup=False)

        yield update


def _print_line(phase: str, done: int, total: int, message: str) -> None:
    now = time.strftime("%H:%M:%S")
    print(f"{now} {_step(phase, done, total)}{': ' if message else ''}{message}", file=sys.stderr, flush=True)


def _step(phase: str, done: int, total: int) -> str:
    return f"{_LABELS[phase]} block {done} of {total}" if phase in _BY_BLOCK else _LABELS[phase]
