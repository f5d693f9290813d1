"""How far a run is, from its journal: while it goes on, after it ended, or after it died."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from billhook.layerworkers.errors import InputError
from billhook.orchestrator.history import history_of
from billhook.orchestrator.journal import read_journal
from billhook.orchestrator.output import holder_of, is_locked, is_ours
from billhook.orchestrator.paths import user_path

RECENT_BLOCKS = 5
"""Blocks that the rate is taken from."""


@dataclass(frozen=True)
class Status:
    """How far a run is."""

    state: Literal["running", "interrupted", "failed", "died", "finished"]
    """``died``: without a word, as after SIGKILL or when the power failed."""
    blocks_done: int
    blocks: int | None
    """None: the run ended before it began with the blocks."""
    seconds_per_block: float | None
    """Median of the last blocks; None where there is none yet."""
    seconds_left: float | None
    """For the blocks that are not done, at that rate; None where it is not known."""
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
        raise InputError(f"{output}: no billhook run in this folder")
    running = is_locked(folder)  # before the journal is read: a run that ends in between is then no dead one
    lines = read_journal(folder)
    history = history_of(lines)
    blocks = next((line["blocks"] for line in reversed(lines) if line["kind"] == "start"), None)
    last = next((line for line in reversed(lines) if line["kind"] != "rest"), {})
    is_failure = last.get("kind") == "lost" or (last.get("kind") == "error" and not running)
    failed = last if is_failure and history.done is None else {}
    holder = holder_of(folder)
    recent = [line["seconds"] for line in history.blocks[-RECENT_BLOCKS:]]
    rate = statistics.median(recent) if recent else None
    recipe = history.decided[-1].fingerprint["recipe"] if history.decided else {}
    return Status(
        _state(running, history.done is not None, failed.get("type")),
        len(history.blocks),
        blocks,
        rate,
        None if rate is None or blocks is None else rate * (blocks - len(history.blocks)),
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


def _state(
    running: bool, finished: bool, error: str | None
) -> Literal["running", "interrupted", "failed", "died", "finished"]:
    if finished:
        return "finished"
    if running:
        return "running"
    if error is None:
        return "died"
    return "interrupted" if error in ("Interrupted", "KeyboardInterrupt") else "failed"


def status_as_text(found: Status) -> str:
    """Return a status as a few lines for a person."""
    process = f", process {found.pid} on {found.host}" if found.state == "running" and found.pid else ""
    lines = [f"{found.state}{process}"]
    if found.model is not None:
        lines.append(f"prunes     {found.model} with {found.method}, {found.pattern}, sparsity {found.sparsity}")
    total = "" if found.blocks is None else f" of {found.blocks}"
    rate = "" if found.seconds_per_block is None else f", {found.seconds_per_block:.1f} s each"
    left = "" if not found.seconds_left else f", {found.seconds_left:.0f} s left at this rate"
    lines.append(f"blocks     {found.blocks_done}{total} done{rate}{left}")
    if found.begun is not None and found.last_sign is not None:
        stamps = [time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at)) for at in (found.begun, found.last_sign)]
        lines.append(f"begun      {stamps[0]}, last sign of life {stamps[1]}")
    if found.last_error is not None:
        lines.append(f"last error {found.last_error}")
    if found.state in ("interrupted", "failed", "died"):
        lines.append("go on with " + ("billhook prune --resume, or " if found.model else "") + "the same command again")
    return "\n".join(lines)
