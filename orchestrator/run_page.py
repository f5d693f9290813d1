"""How far a run is, as a page for a person: live on a terminal, and in ``billhook status``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from rich.text import Text

from billhook.orchestrator.pages import TIERS, Row, bar, page, usage
from billhook.orchestrator.run_facts import RunFacts
from billhook.orchestrator.units import duration, gibibytes

MANY_WORKERS = 8
"""More are counted by what they do instead of listed."""

SILENT_SECONDS = 6.0
"""A worker that has said nothing for so long is said to be silent."""

WORST = 4
"""So many kinds of linears are shown with their errors, the largest."""


def run_page(facts: RunFacts, now: float) -> Text:
    """Return the page. now: seconds since the epoch."""
    return page([("now", f"{facts.doing} for {duration(max(0.0, now - facts.since))}"), *run_rows(facts, now)])


def run_rows(facts: RunFacts, now: float) -> Iterator[Row]:
    """Yield blocks, budgets, errors and workers, as far as they are known."""
    if facts.blocks:
        yield "blocks", Text.assemble(bar(facts.done / facts.blocks, "green"), f" {_pace(facts, now)}")
    for tier, title in TIERS.items():
        used, limit = facts.peak_bytes.get(tier, 0), facts.budget_bytes.get(tier)
        if used:
            planned = facts.planned_peak_bytes.get(tier)
            yield title, usage(used, limit, f"planned {gibibytes(planned)}" if planned else "")
    if facts.errors:
        worst = sorted(facts.errors.items(), key=lambda each: -each[1])[:WORST]
        yield "errors", ", ".join(f"{kind} {error:.4f}" for kind, error in worst) + " in the last block"
    if facts.workers:
        yield "workers", _workers(facts)
    if facts.lost:
        yield "lost", f"{facts.lost} time(s) a block, with its worker"


def _pace(facts: RunFacts, now: float) -> str:
    told = f"{facts.done} of {facts.blocks}"
    if facts.seconds_per_block is not None:
        told += f", {duration(facts.seconds_per_block)} each"
    if facts.seconds_left:
        told += f", about {duration(max(0.0, facts.seconds_left - max(0.0, now - facts.since)))} left"
    return told


def _workers(facts: RunFacts) -> str:
    silent = [
        f"{rank} silent for {duration(seconds)}"
        for rank, seconds in enumerate(facts.silent_seconds)
        if seconds > SILENT_SECONDS
    ]
    if len(facts.workers) > MANY_WORKERS:
        doing = [f"{count} {what}" for what, count in Counter(facts.workers).most_common()]
    else:
        doing = [f"{rank} {what}" for rank, what in enumerate(facts.workers)]
    places = f" on {', '.join(sorted(set(facts.hosts)))}" if len(set(facts.hosts)) > 1 else ""
    return ", ".join([*doing, *silent]) + places
