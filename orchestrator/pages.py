"""Pages of labelled rows, some of them with bars: in colours where there are colours."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from rich.console import Console
from rich.text import Text

from billhook.orchestrator.units import gibibytes

Row = tuple[str, Text | str]
"""A label, empty where it goes on with the row before, and what it says."""

GAP: Row = ("", "")
"""An empty line."""

LABEL_WIDTH = 11
BAR_WIDTH = 24
FULL, EMPTY = "█", "░"
TIERS = {"ram": "RAM", "vram": "GPU", "disk": "disk"}
"""Titles of the budgets."""

NEARLY_FULL = 0.9
"""From this share on a bar is yellow; beyond its limit it is red."""


def page(rows: Iterable[Row]) -> Text:
    """Return the rows as one text."""
    return Text("\n").join(
        Text() if row == GAP else Text.assemble((f"{row[0]:<{LABEL_WIDTH}}", "bold"), row[1]) for row in rows
    )


def bar(share: float, style: str) -> Text:
    """Return a bar of which ``share`` is full."""
    full = min(BAR_WIDTH, round(BAR_WIDTH * share))
    return Text.assemble((FULL * full, style), (EMPTY * (BAR_WIDTH - full), "dim"))


def usage(used_bytes: int, limit_bytes: int | None, note: str = "") -> Text:
    """Return how much is used of a budget; None: of no limit. note: what else to say of it."""
    told = f", {note}" if note else ""
    if limit_bytes is None:
        return Text(f"{gibibytes(used_bytes)}, no limit{told}")
    share = used_bytes / limit_bytes if limit_bytes else 1.0
    style = "red" if share > 1 else "yellow" if share >= NEARLY_FULL else "green"
    return Text.assemble(bar(share, style), f" {gibibytes(used_bytes)} of {gibibytes(limit_bytes)}, {share:.0%}{told}")


def show(page: Text) -> None:
    """Print to standard output: in colours on a terminal, and in ASCII where bars cannot be encoded."""
    console = Console(highlight=False, soft_wrap=True)
    if console.encoding.startswith("utf"):
        console.print(page)
    else:
        sys.stdout.write(page.plain.replace(FULL, "#").replace(EMPTY, ".") + "\n")
