"""What a report tells of a run: from the journal what was done, from the log what it took, whatever state it is in."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from billhook.layerworkers.errors import NoRunError
from billhook.layerworkers.tasks import LinearReport
from billhook.orchestrator.event_log import Logged, read_events
from billhook.orchestrator.events import BlockDone, RunBegun, RunFinished
from billhook.orchestrator.history import Decided, history_of, linear_report
from billhook.orchestrator.journal import Line, read_journal
from billhook.orchestrator.run_status import Status, status


@dataclass(frozen=True)
class Pruned:
    """A linear that was pruned."""

    block: int
    kind: str
    """Its name within the block; a ``*`` for the number of an expert."""
    came_out: LinearReport

    @property
    def sparsity(self) -> float:
        """Zeros over elements."""
        rows, columns = self.came_out.shape
        return self.came_out.zeros / (rows * columns)


@dataclass(frozen=True)
class RunRecord:
    """A run, as far as it has got."""

    output: Path
    status: Status
    decided: tuple[Decided, ...]
    """By what each range of blocks is pruned."""
    linears: tuple[Pruned, ...]
    """Those of the committed blocks, in the order of execution."""
    block_seconds: Mapping[int, float]
    """Of each committed block."""
    planned: RunBegun | None
    """By the last command; None where no log tells."""
    blocks: Mapping[int, BlockDone]
    """Those of the committed blocks that the log tells of."""
    peak_bytes: Mapping[str, int]
    """The most of all commands, by tier; empty where no log tells."""
    lines: tuple[Line, ...]
    """Of the journal."""
    log: tuple[Logged, ...]

    @property
    def sparsity(self) -> float | None:
        """Zeros over elements of what is pruned; None where nothing is."""
        elements = sum(each.came_out.shape[0] * each.came_out.shape[1] for each in self.linears)
        return sum(each.came_out.zeros for each in self.linears) / elements if elements else None


def read_record(output: Path) -> RunRecord:
    """Read what is known of the run in ``output``; nothing is changed.

    Raises:
        InputError: when the folder holds no run, or one of which nothing is decided yet.
    """
    state = status(output)
    lines = read_journal(output)
    history = history_of(lines)
    if not history.decided:
        raise NoRunError(f"{output}: the run has not got as far as a plan; there is nothing to report yet")
    log = read_events(output)
    begun = [each.event for each in log if isinstance(each.event, RunBegun)]
    told = {each.event.index: each.event for each in log if isinstance(each.event, BlockDone)}
    return RunRecord(
        output,
        state,
        history.decided,
        tuple(
            Pruned(block["index"], kind_of(linear["name"], block["index"]), linear_report(linear))
            for block in history.blocks
            for linear in block["linears"]
        ),
        {block["index"]: block["seconds"] for block in history.blocks},
        begun[-1] if begun else None,
        {index: event for index, event in told.items() if index < len(history.blocks)},
        _peaks(log),
        tuple(lines),
        tuple(log),
    )


def kind_of(name: str, block: int) -> str:
    """Return what the linears at the same place of all blocks, and of all experts, share: part of the name on disk."""
    before, found, within = f".{name}".partition(f".{block}.")
    within = within if found else before[1:]
    return re.sub(r"\.\d+(?=\.)|\[\d+\]", lambda match: "[*]" if match[0][0] == "[" else ".*", within).removesuffix(
        ".weight"
    )


def _peaks(log: Sequence[Logged]) -> dict[str, int]:
    peaks: dict[str, int] = {}
    for each in log:
        if isinstance(each.event, BlockDone | RunFinished):
            for tier, size_bytes in each.event.peak_bytes.items():
                peaks[tier] = max(size_bytes, peaks.get(tier, 0))
    return peaks
