"""The page of a report: one HTML file that loads nothing and runs no script but its own."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import math
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from billhook.orchestrator.recorded import Recorded
from billhook.orchestrator.reporting import sections
from billhook.orchestrator.reporting.decisions import decisions
from billhook.orchestrator.reporting.perplexity import perplexity_section
from billhook.orchestrator.reporting.plots import error_plot, sparsity_plot, time_plot
from billhook.orchestrator.reporting.record import RunRecord

HERE = Path(__file__).parent


def page(record: RunRecord, recorded: Sequence[Recorded] = ()) -> str:
    """Return the report of a run, with the evaluations that were ``recorded`` of it and of its source."""
    import jinja2
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string((HERE / "page.html").read_text(encoding="utf-8"))
    scripts = {"plotly": get_plotlyjs(), "script": (HERE / "page.js").read_text(encoding="utf-8")}
    drawn = [error_plot(record.linears), sparsity_plot(record.linears), time_plot(record)]
    plots = {plot.name: plot for plot in drawn if plot is not None}
    tables = sections.tables(record)
    return template.render(
        policy=_policy(scripts.values()),
        style=Markup((HERE / "page.css").read_text(encoding="utf-8")),
        **{name: Markup(text) for name, text in scripts.items()},
        **sections.head(record),
        tiles=sections.tiles(record, recorded),
        recipe=sections.recipe(record),
        **perplexity_section(record, recorded),
        plots={name: plots.get(name) for name in ("error", "sparsity", "time")},
        parts=sections.parts(record),
        tiers=sections.tiers(record),
        decisions=[
            dataclasses.asdict(each) | {"time": None if each.time is None else sections.stamp(each.time)}
            for each in decisions(record)
        ],
        tables=tables,
        command=sections.commands(record),
        surroundings=sections.surroundings(record),
        written=sections.stamp(time.time()),
        facts=_finite({"plots": [dataclasses.asdict(plot) for plot in plots.values()], "tables": tables}),
    )


def _policy(scripts: Iterable[str]) -> str:
    """Return what a browser may do with the page: run these scripts, and load nothing from anywhere."""
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts]
    allowed = " ".join(f"'sha256-{each}'" for each in hashes)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _finite(value: Any) -> Any:
    """Return JSON values without the numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
