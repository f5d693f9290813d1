"""The plots of a report, as Plotly takes them: plain JSON values, every name in them escaped.

Plotly reads markup in its texts, and what is named in a checkpoint is not to be trusted. Colours that begin with ``--``
are names of the page's style: its script puts in what they are in the light or the dark.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from billhook.layerworkers.stopwatch import PARTS
from billhook.orchestrator.reporting.record import Pruned, RunRecord

SPAN = 100
"""How many times the smallest of the errors that are told apart goes into the largest."""

ALIKE = 0.01
"""Sparsities that differ by less are shown by one colour."""

SCALE = [[0, "--scale-0"], [0.5, "--scale-1"], [1, "--scale-2"]]

_LAYOUT: dict[str, Any] = {
    "paper_bgcolor": "rgba(0,0,0,0)",
    "plot_bgcolor": "rgba(0,0,0,0)",
    "font": {"color": "--ink", "family": "system-ui, sans-serif", "size": 12},
    "hoverlabel": {"bgcolor": "--surface", "bordercolor": "--line", "font": {"color": "--ink"}, "align": "left"},
    "margin": {"l": 8, "r": 8, "t": 8, "b": 8},
}
_AXIS: dict[str, Any] = {"automargin": True, "gridcolor": "--line", "zeroline": False, "linecolor": "--line"}


@dataclass(frozen=True)
class Plot:
    """One plot."""

    name: str
    """Of the element that it is drawn into."""
    caption: str
    data: list[dict[str, Any]]
    layout: dict[str, Any]


def error_plot(linears: Sequence[Pruned]) -> Plot | None:
    """Return the errors by block and kind of linear, the largest of experts; None where there is none above 0."""
    cells = _cells(linears, lambda each: each.came_out.error)
    errors = [each.came_out.error for each in cells.values() if _shown(each)]
    if not errors:
        return None
    largest, smallest = max(errors), max(min(errors), max(errors) / SPAN)
    plot = _heatmap(
        "error",
        "Error of each linear as its method measures it, relative to what it was; the scale is logarithmic, and ends "
        f"at a {SPAN}th of the largest" + _of_experts(linears, "the largest is shown"),
        cells,
        lambda each: math.log10(each.came_out.error) if _shown(each) else None,
    )
    ticks = _ticks(smallest, largest)
    plot.data[0] |= {"zmin": math.log10(smallest), "zmax": max(math.log10(largest), math.log10(smallest) + 1e-6)}
    plot.data[0]["colorbar"] |= {
        "tickvals": [math.log10(tick) for tick in ticks],
        "ticktext": [f"{tick:.3g}" for tick in ticks],
    }
    return plot


def sparsity_plot(linears: Sequence[Pruned]) -> Plot | None:
    """Return the sparsities by block and kind of linear, the smallest of experts; None where nothing was pruned."""
    cells = _cells(linears, lambda each: -each.sparsity)
    if not cells:
        return None
    plot = _heatmap(
        "sparsity",
        "Share of each linear's weights that are zero" + _of_experts(linears, "the smallest is shown"),
        cells,
        lambda each: each.sparsity,
    )
    shares = [each.sparsity for each in cells.values()]
    alike = max(shares) - min(shares) < ALIKE
    plot.data[0] |= {"zmin": 0, "zmax": 1} if alike else {"zmin": min(shares), "zmax": max(shares)}
    plot.data[0]["colorbar"] |= {"tickformat": ".0%" if alike else ".3~p", "nticks": 5}
    return plot


def time_plot(record: RunRecord) -> Plot | None:
    """Return what the time of each block was spent on, and what was planned; None where no log tells."""
    if not record.blocks:
        return None
    blocks = sorted(record.blocks)
    parts = [name for name in PARTS if any(record.blocks[index].parts_seconds.get(name) for index in blocks)]
    data: list[dict[str, Any]] = [
        {
            "type": "bar",
            "name": part,
            "x": blocks,
            "y": [round(record.blocks[index].parts_seconds.get(part, 0.0), 4) for index in blocks],
            "marker": {"color": f"--part-{PARTS.index(part)}", "line": {"width": 0}},
            "hovertemplate": "%{y:.3~g} s",
        }
        for part in parts
    ]
    if record.planned is not None and record.planned.planned_block_seconds:
        planned = record.planned.planned_block_seconds
        known = [index for index in blocks if index < len(planned)]
        data.append(
            {
                "type": "scatter",
                "name": "planned",
                "mode": "lines" if len(known) > 1 else "markers",
                "x": known,
                "y": [round(planned[index], 4) for index in known],
                "line": {"color": "--ink", "width": 2, "dash": "dot", "shape": "hvh"},
                "marker": {"color": "--ink", "symbol": "line-ew-open", "size": 24},
                "hovertemplate": "%{y:.3~g} s",
            }
        )
    layout = {
        **_LAYOUT,
        "barmode": "stack",
        "bargap": 0.15,
        "hovermode": "x unified",
        "height": 360,
        "xaxis": {**_AXIS, "title": {"text": "block"}, "showgrid": False, "tickformat": "d"},
        "yaxis": {**_AXIS, "title": {"text": "seconds"}, "rangemode": "tozero"},
        "legend": {"orientation": "h", "y": -0.25, "yanchor": "top", "x": 0, "traceorder": "normal"},
    }
    return Plot("time", "What the slowest worker of each block spent its time on, and what was planned", data, layout)


def escaped(text: str) -> str:
    """Return a text that Plotly shows as it is."""
    return html.escape(text)


Cells = Mapping[tuple[str, int], Pruned]


def _cells(linears: Sequence[Pruned], size: Callable[[Pruned], float]) -> Cells:
    """Return, of each kind in each block, the linear of the largest ``size``."""
    cells: dict[tuple[str, int], Pruned] = {}
    for each in linears:
        place = (each.kind, each.block)
        if place not in cells or size(each) > size(cells[place]):
            cells[place] = each
    return cells


def _heatmap(name: str, caption: str, cells: Cells, value: Callable[[Pruned], float | None]) -> Plot:
    kinds = list(dict.fromkeys(kind for kind, _ in cells))
    blocks = sorted({block for _, block in cells})
    found = [[cells.get((kind, block)) for block in blocks] for kind in kinds]
    data = [
        {
            "type": "heatmap",
            "x": blocks,
            "y": [escaped(kind) for kind in kinds],
            "z": [[None if each is None else value(each) for each in row] for row in found],
            "text": [["not pruned" if each is None else _told(each) for each in row] for row in found],
            "hoverinfo": "text",
            "xgap": 1,
            "ygap": 1,
            "colorscale": SCALE,
            "colorbar": {
                "orientation": "h",
                "thickness": 10,
                "len": 1,
                "tickangle": 0,
                "x": 0,
                "xanchor": "left",
                "y": 1,
                "yanchor": "bottom",
                "outlinewidth": 0,
            },
        }
    ]
    layout = {
        **_LAYOUT,
        "height": 130 + 26 * len(kinds),
        "xaxis": {**_AXIS, "title": {"text": "block"}, "showgrid": False, "tickformat": "d"},
        "yaxis": {**_AXIS, "showgrid": False, "autorange": "reversed", "type": "category"},
    }
    return Plot(name, caption, data, layout)


def _told(each: Pruned) -> str:
    report = each.came_out
    lines = [
        f"<b>{escaped(report.name)}</b>",
        f"error {report.error:.4g}, sparsity {each.sparsity:.4f}, {escaped(report.pattern)}",
        f"{report.shape[0]} × {report.shape[1]}, {escaped(report.method)}",
    ]
    if report.dampings:
        lines.append(f"damping {' → '.join(f'{damping:.3g}' for damping in report.dampings)}")
    if report.tokens is not None:
        lines.append(f"{report.tokens} tokens" + (f", {escaped(report.fallback)}" if report.fallback else ""))
    return "<br>".join(lines)


def _shown(each: Pruned) -> bool:
    return 0 < each.came_out.error < math.inf


def _of_experts(linears: Sequence[Pruned], which: str) -> str:
    return f"; of experts, {which}" if any("*" in each.kind for each in linears) else ""


def _ticks(low: float, high: float) -> list[float]:
    """Return round numbers from ``low`` to ``high``, or the two themselves where fewer than two are."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1,), (1, 3), (1, 2, 5)):
        ticks = [step * 10.0**decade for decade in decades for step in steps if low <= step * 10.0**decade <= high]
        if len(ticks) > 2:
            return ticks
    return [low, high] if high > low else [low]
