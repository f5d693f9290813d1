"""How far a run is, from its journal and its log: while it goes on, after it ended, or after it died."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from rich.text import Text

from billhook.layerworkers.errors import NoRunError
from billhook.layerworkers.methods import COLLECT
from billhook.orchestrator.event_log import read_events
from billhook.orchestrator.history import history_of
from billhook.orchestrator.journal import read_journal
from billhook.orchestrator.output import holder_of, is_locked, is_ours
from billhook.orchestrator.pages import Row, page
from billhook.orchestrator.paths import user_path
from billhook.orchestrator.run_facts import RECENT_BLOCKS, RunFacts, facts_of
from billhook.orchestrator.run_page import run_rows
from billhook.orchestrator.units import duration

State = Literal["running", "interrupted", "failed", "died", "finished"]


@dataclass(frozen=True)
class Status:
    """How far a run is."""

    state: State
    """``died``: without a word, as after SIGKILL or when the power failed."""
    doing: str | None
    """What it does at the moment, as ``pruning block 4 of 30``; None where it does not run."""
    doing_seconds: float | None
    """For how long."""
    blocks_done: int
    blocks: int | None
    """None: the run ended before it began with the blocks."""
    seconds_per_block: float | None
    """Median of the last blocks; None where there is none yet."""
    seconds_left: float | None
    """For the blocks that are not done, at that rate, or else as planned; None where neither is known."""
    peak_bytes: Mapping[str, int]
    """The most that the last command has used of ``vram``, ``ram`` and ``disk``; empty before its first block."""
    planned_peak_bytes: Mapping[str, int]
    """The same, as planned."""
    budget_bytes: Mapping[str, int | None]
    """What it may use; None: no limit."""
    errors: Mapping[str, float]
    """Mean errors of the last block, by kind of linear."""
    lost: int
    """How often the last command has lost a block."""
    warnings: tuple[str, ...]
    last_error: str | None
    """Why a block was lost, or the last command failed or was interrupted, if no block was done since."""
    begun: float | None
    """When the run was begun, in seconds since the epoch."""
    last_sign: float | None
    """When the journal grew last."""
    pid: int | None
    """Of the last command."""
    host: str | None
    model: str | None
    method: str | None
    pattern: str | None
    sparsity: float | None


def status(output: str | Path) -> Status:
    """Say how far the run in ``output`` is; nothing is changed.

    Raises:
        InputError: when the folder holds no run.
    """
    folder = user_path(output)
    if not folder.is_dir() or not is_ours(folder):
        raise NoRunError(f"{output}: no billhook run in this folder")
    running = is_locked(folder)  # before the journal is read: a run that ends in between is then no dead one
    lines = read_journal(folder)
    history = history_of(lines)
    blocks = next((line["blocks"] for line in reversed(lines) if line["kind"] == "start"), None)
    last = next((line for line in reversed(lines) if line["kind"] != "rest"), {})
    is_failure = last.get("kind") == "lost" or (last.get("kind") == "error" and not running)
    failed = last if is_failure and history.done is None else {}
    holder = holder_of(folder)
    recent = tuple(line["seconds"] for line in history.blocks[-RECENT_BLOCKS:])
    # What the journal knows too is taken from there: nothing depends on the log.
    facts = replace(facts_of(read_events(folder)), done=len(history.blocks), blocks=blocks, recent_seconds=recent)
    recipe = history.decided[-1].fingerprint["recipe"] if history.decided else {}
    return Status(
        _state(running, history.done is not None, failed.get("type")),
        facts.doing if running else None,
        time.time() - facts.since if running and facts.since else None,
        facts.done,
        blocks,
        facts.seconds_per_block,
        facts.seconds_left,
        facts.peak_bytes,
        facts.planned_peak_bytes,
        facts.budget_bytes,
        facts.errors,
        facts.lost,
        facts.warnings,
        failed.get("message"),
        lines[0]["time"] if lines else None,
        lines[-1]["time"] if lines else None,
        holder.get("pid"),
        holder.get("host"),
        history.decided[-1].source if history.decided else None,
        recipe.get("method"),
        recipe.get("pattern"),
        recipe.get("sparsity"),
    )


def _state(running: bool, finished: bool, error: str | None) -> State:
    if finished:
        return "finished"
    if running:
        return "running"
    if error is None:
        return "died"
    return "interrupted" if error in ("Interrupted", "KeyboardInterrupt") else "failed"


def status_page(found: Status) -> Text:
    """Return a status as a few lines for a person."""
    process = f", process {found.pid} on {found.host}" if found.state == "running" and found.pid else ""
    rows: list[Row] = [("state", f"{found.state}{process}")]
    if found.method == COLLECT.name:
        rows.append(("collects", f"statistics of the linears of {found.model}"))
    elif found.model is not None:
        rows.append(("prunes", f"{found.model} with {found.method}, {found.pattern}, sparsity {found.sparsity}"))
    now = time.time()
    if found.doing is not None and found.doing_seconds is not None:
        rows.append(("now", f"{found.doing} for {duration(found.doing_seconds)}"))
    facts = RunFacts(
        since=now - (found.doing_seconds or 0.0),
        done=found.blocks_done,
        blocks=found.blocks,
        recent_seconds=() if found.seconds_per_block is None else (found.seconds_per_block,),
        peak_bytes=found.peak_bytes,
        planned_peak_bytes=found.planned_peak_bytes,
        budget_bytes=found.budget_bytes,
        errors={} if found.method == COLLECT.name else found.errors,
        lost=found.lost,
    )
    rows += run_rows(facts, now)
    rows += [("warning", Text(warning, "yellow")) for warning in found.warnings]
    if found.begun is not None and found.last_sign is not None:
        stamps = [time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at)) for at in (found.begun, found.last_sign)]
        rows.append(("begun", f"{stamps[0]}, last sign of life {stamps[1]}"))
    if found.last_error is not None:
        rows.append(("last error", Text(found.last_error, "red")))
    if found.state in ("interrupted", "failed", "died"):
        ways = "billhook prune --resume, or " if found.model else ""
        rows.append(("go on with", f"{ways}the same command again"))
    return page(rows)
