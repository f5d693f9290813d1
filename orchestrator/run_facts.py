"""How far a run is, by its events: the same facts for the display of a command and for ``billhook status``."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from billhook.orchestrator.event_log import Logged
from billhook.orchestrator.events import (
    Beat,
    BlockDone,
    BlockLost,
    Event,
    RunBegun,
    RunFailed,
    RunFinished,
    Step,
    Warned,
    WorkersStarted,
    errors_by_kind,
)

RECENT_BLOCKS = 5
"""Blocks that the rate is taken from."""


@dataclass(frozen=True)
class RunFacts:
    """What the events of one command have told so far."""

    doing: str = "starting"
    """For people: ``pruning block 4 of 30``, ``replaying block 2 of 30``, ..."""
    since: float = 0.0
    """When that was begun, in seconds since the epoch."""
    done: int = 0
    """Blocks; of another phase than pruning its own."""
    blocks: int | None = None
    recent_seconds: tuple[float, ...] = ()
    """Of the last blocks."""
    planned_seconds: tuple[float, ...] = ()
    """By block."""
    peak_bytes: Mapping[str, int] = field(default_factory=dict)
    planned_peak_bytes: Mapping[str, int] = field(default_factory=dict)
    budget_bytes: Mapping[str, int | None] = field(default_factory=dict)
    errors: Mapping[str, float] = field(default_factory=dict)
    """Of the last block that had any, by kind of linear."""
    hosts: tuple[str, ...] = ()
    """Of the workers, by rank."""
    workers: tuple[str, ...] = ()
    """What each does, by rank."""
    silent_seconds: tuple[float, ...] = ()
    """By rank: since it was last heard of."""
    lost: int = 0
    """How often a block was lost."""
    warnings: tuple[str, ...] = ()

    @property
    def seconds_per_block(self) -> float | None:
        """Median of the last blocks; None where there is none yet."""
        return statistics.median(self.recent_seconds) if self.recent_seconds else None

    @property
    def seconds_left(self) -> float | None:
        """For the blocks that are not done, at that rate, or else as planned; None where neither is known."""
        if self.blocks is None:
            return None
        if self.seconds_per_block is not None:
            return self.seconds_per_block * (self.blocks - self.done)
        return sum(self.planned_seconds[self.done :]) if self.planned_seconds else None


def followed(facts: RunFacts, event: Event, at: float) -> RunFacts:
    """Return the facts after one more event, which was told at ``at`` (seconds since the epoch)."""
    match event:
        case RunBegun():
            facts = RunFacts(
                "starting",
                at,
                event.blocks_done,
                event.blocks,
                planned_seconds=event.planned_block_seconds,
                planned_peak_bytes=event.planned_peak_bytes,
                budget_bytes=event.budget_bytes,
            )
        case Step():
            facts = _stepped(facts, event, at)
        case WorkersStarted():
            facts = _pruning(replace(facts, hosts=event.hosts, workers=(), silent_seconds=()), event.from_block, at)
        case BlockDone():
            facts = replace(
                facts,
                blocks=event.blocks,
                recent_seconds=(*facts.recent_seconds, event.seconds)[-RECENT_BLOCKS:],
                peak_bytes=event.peak_bytes,
                errors=errors_by_kind(event.linears) or facts.errors,
            )
            facts = _pruning(facts, event.index + 1, at)
        case Beat():
            peak = {**facts.peak_bytes, "ram": max(event.ram_bytes, facts.peak_bytes.get("ram", 0))}
            facts = replace(facts, workers=event.doing, silent_seconds=event.silent_seconds, peak_bytes=peak)
        case BlockLost():
            doing = f"restarting workers: block {event.index + 1} was lost"
            facts = replace(facts, doing=doing, since=at, lost=facts.lost + 1, workers=())
        case Warned():
            facts = replace(facts, warnings=(*facts.warnings, event.message))
        case RunFinished():
            facts = replace(facts, doing="finished", since=at, done=event.blocks, peak_bytes=event.peak_bytes)
        case RunFailed():
            facts = replace(facts, doing=str(event), since=at)
    return facts


def _stepped(facts: RunFacts, step: Step, at: float) -> RunFacts:
    if step.phase == "plan":
        return facts
    if step.phase == "replay":  # of blocks that are done
        if step.done >= facts.done:
            return _pruning(facts, facts.done, at)
        return replace(facts, doing=f"replaying block {step.done + 1} of {facts.done}", since=at)
    if step.phase in ("allocate", "gradients", "eval"):
        recent = () if step.done == 1 else (*facts.recent_seconds, at - facts.since)[-RECENT_BLOCKS:]
        facts = replace(facts, recent_seconds=recent, done=step.done, blocks=step.total)
    return replace(facts, doing=str(step).partition(":")[0], since=at)


def facts_of(lines: Iterable[Logged]) -> RunFacts:
    """Return the facts after the lines of a log: those of the last command."""
    facts = RunFacts()
    for line in lines:
        facts = followed(facts, line.event, line.time)
    return facts


def _pruning(facts: RunFacts, done: int, at: float) -> RunFacts:
    if done == facts.blocks:
        return replace(facts, doing="finishing", since=at, done=done, workers=(), silent_seconds=())
    return replace(facts, doing=f"pruning block {done + 1} of {facts.blocks}", since=at, done=done)
