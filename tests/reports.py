"""Runs to report on, made from a real one: interrupted, troubled, or named by an enemy."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from billhook.orchestrator.event_log import log_path
from billhook.orchestrator.journal import append, journal_path, read_journal

Line = dict[str, Any]

HOSTILE = (
    '"><img src=x onerror="document.title=`owned`"></script><script>document.title="owned"</script>\'{{ 7 * 7 }}\ud800'
)
"""A name that a checkpoint may hold, in JSON at least."""


def rewritten(output: Path, into: Path, change: Callable[[list[Line]], list[Line]]) -> Path:
    """Copy what a report is made of, with the journal's lines as ``change`` returns them; return the folder."""
    shutil.copytree(output / "billhook", into / "billhook")
    lines = change(read_journal(output))
    journal_path(into).unlink()
    for line in lines:
        kind, time = line.pop("kind"), line.pop("time")
        append(into, kind, {**line, "time": time})
    return into


def interrupted(output: Path, into: Path) -> Path:
    """Return the run as it was after its first block, when a signal came."""

    def cut(lines: list[Line]) -> list[Line]:
        first = next(number for number, line in enumerate(lines) if line["kind"] == "block")
        last = lines[first]
        return [
            *lines[: first + 1],
            {"kind": "error", "type": "Interrupted", "message": "SIGTERM", "time": last["time"]},
        ]

    return rewritten(output, into, cut)


def troubled(output: Path, into: Path) -> Path:
    """Return the run as if a worker was lost, dampings were raised, experts fell back, and it was gone on with."""

    def trouble(lines: list[Line]) -> list[Line]:
        made = []
        for line in lines:
            if line["kind"] == "block":
                first, second = line["linears"][:2]
                first["dampings"] = [0.01, 0.1, 1.0]
                second["tokens"], second["fallback"] = 3, "pool"
                if line["index"] == 1:
                    at = {"time": line["time"]}
                    made.append({"kind": "lost", "index": 1, "message": "worker 1 died: SIGKILL", **at})
                    made.append({"kind": "error", "type": "RunError", "message": "the disk is full", **at})
                    made.append({"kind": "start", "pid": 7, "host": "spare", "blocks": 3, **at})
            made.append(line)
        return made

    return rewritten(output, into, trouble)


def hostile(output: Path, into: Path) -> Path:
    """Return the run with hostile names wherever names can stand."""

    def rename(lines: list[Line]) -> list[Line]:
        for line in lines:
            for linear in line.get("linears", []):
                linear["name"] += HOSTILE
                linear["fallback"] = HOSTILE
            if line["kind"] == "plan":
                line["source"] += f"/{HOSTILE}"
                line["asked"]["model"] = line["source"]
                line["asked"]["recipe"]["calibration"] = HOSTILE
                line["fingerprint"]["recipe"]["method"] = HOSTILE
                line["fingerprint"]["versions"]["torch"] = HOSTILE
        return [*lines, {"kind": "lost", "index": 1, "message": HOSTILE, "time": lines[-1]["time"]}]

    made = rewritten(output, into, rename)
    with log_path(made).open("a") as file:
        file.write(json.dumps({"time": 0.0, "event": "warning", "message": HOSTILE}) + "\n")
    return made
