"""What the events of a run say has been done."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from billhook.orchestrator.events import BlockDone, Event, Step
from billhook.orchestrator.interruption import Interruption


def step_of(event: Event) -> tuple[str, int]:
    """Return the phase and how much of it is done: of ``prune``, ``replay``, ``allocate`` and ``eval`` blocks."""
    if isinstance(event, BlockDone):
        return "prune", event.index + 1
    return (event.phase, event.done) if isinstance(event, Step) else (type(event).__name__, 0)


def ending_at(phase: str, done: int, heard: Callable[[Event], None] = lambda event: None) -> dict[str, Any]:
    """Return arguments that let a command be asked to end once so much is done, and finish what is under way.

    heard: told of every event before.
    """
    interruption = Interruption(grace_seconds=100.0)

    def ask(event: Event) -> None:
        heard(event)
        if step_of(event) == (phase, done):
            interruption.ask()

    return {"progress": ask, "interruption": interruption}
