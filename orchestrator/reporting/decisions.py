"""What was decided on the way, by the run or by who ran it: what a reader should know before trusting the result."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

from billhook.orchestrator.event_log import Logged
from billhook.orchestrator.events import Warned, WorkersStarted
from billhook.orchestrator.history import Decided
from billhook.orchestrator.journal import Line
from billhook.orchestrator.reporting.record import Pruned, RunRecord


@dataclass(frozen=True)
class Decision:
    """Something that did not go by the plan alone."""

    title: str
    details: tuple[str, ...] = ()
    time: float | None = None
    """Seconds since the epoch; None: it holds for the whole run."""


def decisions(record: RunRecord) -> list[Decision]:
    """Return what was decided: first what holds for the result, then what happened, in the order of time."""
    happened = [*_in_journal(record.lines), *_in_log(record.log)]
    return [
        *_about_linears(record.linears),
        *_branches(record.decided),
        *sorted(happened, key=lambda decision: decision.time or 0.0),
    ]


def _about_linears(linears: Sequence[Pruned]) -> Iterator[Decision]:
    raised = [each for each in linears if len(each.came_out.dampings) > 1]
    if raised:
        told = (
            f"{each.came_out.name}: {' → '.join(f'{damping:.3g}' for damping in each.came_out.dampings)}"
            for each in raised
        )
        yield Decision(
            f"Damping raised for {len(raised)} of {len(linears)} linears: their Gram matrix could not be factorised "
            "with less",
            tuple(told),
        )
    instead = {
        "pool": "fitted to all tokens of their layer",
        "magnitude": "pruned by magnitude",
        "dense": "left dense",
    }
    starved = sorted((each for each in linears if each.came_out.fallback), key=lambda each: each.came_out.fallback)
    for fallback, group in groupby(starved, key=lambda each: each.came_out.fallback):
        fallen = list(group)
        yield Decision(
            f"{len(fallen)} linears of experts that few calibration tokens are sent to were "
            + instead.get(fallback, fallback),
            tuple(f"{each.came_out.name}: {each.came_out.tokens} tokens" for each in fallen),
        )
    more = [each for each in linears if each.came_out.zeros > each.came_out.removed]
    if more:
        told = (
            f"{each.came_out.name}: {each.came_out.zeros - each.came_out.removed} more than {each.came_out.removed}"
            for each in more
        )
        yield Decision(
            f"{len(more)} linears hold zeros beside those removed: kept weights that are or became 0", tuple(told)
        )


def _branches(decided: Sequence[Decided]) -> Iterator[Decision]:
    for before, after in pairwise(decided):
        yield Decision(
            f"Blocks from {after.first_block} on were pruned by another plan than those before",
            tuple(_differences(before.fingerprint, after.fingerprint)),
        )


def _differences(old: object, new: object, name: str = "") -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            yield from _differences(old.get(key), new.get(key), f"{name}.{key}" if name else str(key))
    elif old != new:
        yield f"{name}: {old} → {new}"


def _in_journal(lines: Sequence[Line]) -> Iterator[Decision]:
    done, commands = 0, 0
    for line in lines:
        at = line["time"]
        if line["kind"] == "block":
            done = line["index"] + 1
        elif line["kind"] == "branch":
            done = line["from_block"]
            yield Decision(f"Begun again from block {done} on with another plan", (), at)
        elif line["kind"] == "start":
            commands += 1
            if commands > 1:
                yield Decision(f"Gone on with after {done} blocks, by process {line['pid']} on {line['host']}", (), at)
        elif line["kind"] == "lost":
            yield Decision(f"Block {line['index']} was lost with a worker, and tried again", (line["message"],), at)
        elif line["kind"] == "error":
            asked = line["type"] in ("Interrupted", "KeyboardInterrupt")
            title = "Interrupted" if asked else f"Failed ({line['type']})"
            yield Decision(f"{title} after {done} blocks", (line["message"],), at)


def _in_log(log: Sequence[Logged]) -> Iterator[Decision]:
    started = [(each.time, each.event) for each in log if isinstance(each.event, WorkersStarted)]
    for (_, before), (at, after) in pairwise(started):
        if sorted(before.nodes) != sorted(after.nodes):
            yield Decision(
                f"{len(after.nodes)} worker(s) from block {after.from_block} on, after {len(before.nodes)}", (), at
            )
    for each in log:
        if isinstance(each.event, Warned):
            yield Decision("Warning", (each.event.message,), each.time)
