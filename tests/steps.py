"""What the events of a run say has been done."""

from __future__ import annotations

from billhook.orchestrator.events import BlockDone, Event, Step


def step_of(event: Event) -> tuple[str, int]:
    """Return the phase and how much of it is done: of ``prune``, ``replay``, ``allocate`` and ``eval`` blocks."""
    if isinstance(event, BlockDone):
        return "prune", event.index + 1
    return (event.phase, event.done) if isinstance(event, Step) else (type(event).__name__, 0)
