"""The sections of a report that are words and numbers."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from billhook.layerworkers.stopwatch import PARTS
from billhook.orchestrator.command import as_line, prune_words
from billhook.orchestrator.recorded import Recorded
from billhook.orchestrator.reporting.perplexity import as_text, compared
from billhook.orchestrator.reporting.record import RunRecord
from billhook.orchestrator.units import duration, gibibytes

Rows = list[tuple[str, str]]

_TIERS = {"ram": "RAM", "vram": "GPU", "disk": "Disk"}


def head(record: RunRecord) -> dict[str, Any]:
    """Return the title, the state, and what went wrong where something did."""
    found, last = record.status, record.decided[-1]
    name = (
        last.asked["model"] if "/" in last.asked["model"] and last.asked["model"][0] != "/" else Path(last.source).name
    )
    total = f" of {found.blocks}" if found.blocks is not None else ""
    begun = "" if found.begun is None else f", begun {stamp(found.begun)}"
    trouble = None
    if found.state in ("interrupted", "failed", "died"):
        again = as_line(["billhook", "prune", "--resume", str(record.output)])
        trouble = {
            "title": f"This run is not finished: it {'was ' if found.state == 'interrupted' else ''}{found.state}",
            "detail": (f"{found.last_error}. " if found.last_error else "")
            + f"What follows is of the blocks that are done. To go on: {again}",
        }
    return {
        "title": f"{name}, pruned",
        "state": found.state,
        "subtitle": f"{len(record.block_seconds)}{total} blocks done{begun}",
        "trouble": trouble,
    }


def tiles(record: RunRecord, recorded: Sequence[Recorded]) -> list[dict[str, str]]:
    """Return the few figures that come first."""
    rows: Rows = []
    if record.sparsity is not None:
        rows.append(("of the weights pruned are zero", f"{record.sparsity:.1%}"))
    rows.append(("linears pruned", f"{len(record.linears):,}"))
    errors = sorted(each.came_out.error for each in record.linears)
    if errors:
        rows.append(("median error of a linear", f"{errors[len(errors) // 2]:.3g}"))
    if record.block_seconds:
        rows.append(("to prune the blocks", duration(sum(record.block_seconds.values()))))
    if record.peak_bytes.get("ram"):
        rows.append(("peak RAM", gibibytes(record.peak_bytes["ram"])))
    rows += [
        ("perplexity, dense → pruned", f"{as_text(pair.dense)} → {as_text(pair.pruned.perplexity)}")
        for pair in compared(record, recorded)[:1]
    ]
    return [{"name": name, "value": value} for name, value in rows]


def recipe(record: RunRecord) -> Rows:
    """Return what was pruned and how."""
    last = record.decided[-1]
    made, asked = last.fingerprint["recipe"], last.asked["recipe"]
    kinds = Counter(each.kind for each in record.linears)
    rows = [
        ("model", str(last.source)),
        ("output", str(record.output)),
        ("method", made["method"] + _in_brackets(made["options"])),
        ("pattern", made["pattern"]),
        ("sparsity", f"{made['sparsity']:g}"),
        ("allocation", made["allocation"].partition(" ")[0] + _in_brackets(made["allocation_options"])),
    ]
    if "samples" in made:
        rows += [
            (
                "calibration",
                f"{made['samples']} samples of {made['seqlen']} tokens from {asked['calibration']}, "
                f"seed {made['seed']}",
            ),
            ("tokens sha256", str(made["calibration"])),
            (
                "fitted to",
                "the dense block's inputs"
                if made["fit"] == "dense-block"
                else "inputs that passed what is pruned before",
            ),
        ]
        if any("*" in kind for kind in kinds):
            rows.append(
                (
                    "experts",
                    f"route {made['route']}; with fewer than {made['expert_tokens']:g} tokens a channel: "
                    f"{made['expert_fallback']}",
                )
            )
    else:
        rows.append(("calibration", "none: the method needs no data"))
    rows += [(f"{key}d", ", ".join(made[key])) for key in ("include", "exclude") if made[key]]
    if kinds:
        rows.append(("linears", ", ".join(f"{count} × {kind}" for kind, count in kinds.items())))
    workers = "" if record.planned is None else f"{record.planned.workers} worker(s) of "
    rows.append(("computed", f"in {made['dtype']} on {made['device']}, {workers}{made['threads']} thread(s)"))
    return rows


def parts(record: RunRecord) -> list[dict[str, str]]:
    """Return what all blocks together spent their time on, and what was planned for them."""
    planned: defaultdict[str, float] = defaultdict(float)
    if record.planned is not None:
        of_blocks = enumerate(record.planned.planned_parts_seconds)
        for name, seconds in (item for index, each in of_blocks if index in record.blocks for item in each.items()):
            planned[name] += seconds
    measured: defaultdict[str, float] = defaultdict(float)
    for block in record.blocks.values():
        for name, seconds in block.parts_seconds.items():
            measured[name] += seconds
    names = [name for name in dict.fromkeys([*PARTS, *planned, *measured]) if measured[name] or planned[name]]
    return [
        {
            "name": name,
            "seconds": f"{measured[name]:.2f}",
            "planned": f"{planned[name]:.2f}" if planned[name] else "",
        }
        for name in names
    ]


def tiers(record: RunRecord) -> list[dict[str, Any]]:
    """Return the measured peaks beside the planned ones and the budgets: shares of the bar's width in per cent."""
    planned = record.planned
    shown = []
    for tier, name in _TIERS.items():
        measured = record.peak_bytes.get(tier, 0)
        expected = planned.planned_peak_bytes.get(tier) if planned else None
        budget = planned.budget_bytes.get(tier) if planned else None
        width = max(measured, expected or 0, budget or 0)
        if not measured:
            continue
        told = f"{gibibytes(measured)} measured" + (f", {gibibytes(expected)} planned" if expected else "")
        shown.append(
            {
                "name": name,
                "told": told + (f", {gibibytes(budget)} allowed" if budget else ", no limit"),
                "measured": round(100 * measured / width, 2),
                "planned": round(100 * expected / width, 2) if expected else None,
                "over": bool(budget and measured > budget),
            }
        )
    return shown


def tables(record: RunRecord) -> list[dict[str, Any]]:
    """Return the linears and the blocks, row by row, as the page's script shows them."""
    if not record.linears:
        return []
    dampings = any(each.came_out.dampings for each in record.linears)
    tokens = any(each.came_out.tokens is not None for each in record.linears)
    columns = [_column("linear"), _column("block", True), _column("shape"), _column("pattern"), _column("method")]
    columns += [_column("sparsity", True, 4), _column("zeros", True), _column("error", True, 4)]
    columns += [_column("damping", True, 3)] if dampings else []
    columns += [_column("tokens", True), _column("fallback")] if tokens else []
    rows: list[list[Any]] = []
    for each in record.linears:
        out = each.came_out
        row = [out.name, each.block, f"{out.shape[0]} × {out.shape[1]}", out.pattern, out.method]
        row += [each.sparsity, out.zeros, out.error]
        row += [out.dampings[-1] if out.dampings else None] if dampings else []
        row += [out.tokens, out.fallback] if tokens else []
        rows.append(row)
    linears = {"name": "linears", "title": "Linears", "columns": columns, "rows": rows}
    return [linears, _blocks(record)]


def _blocks(record: RunRecord) -> dict[str, Any]:
    columns = [_column("block", True), _column("seconds", True, 4), _column("planned", True, 4)]
    columns += [_column("largest error", True, 4), _column("in"), _column("MiB moved", True, 4)]
    rows: list[list[Any]] = []
    expected = () if record.planned is None else record.planned.planned_block_seconds
    for index, seconds in record.block_seconds.items():
        worst = max(
            (each for each in record.linears if each.block == index), key=lambda each: each.came_out.error, default=None
        )
        done = record.blocks.get(index)
        rows.append(
            [
                index,
                seconds,
                expected[index] if index < len(expected) else None,
                None if worst is None else worst.came_out.error,
                "" if worst is None else worst.kind,
                None if done is None else done.moved_bytes / 2**20,
            ]
        )
    return {"name": "blocks", "title": "Blocks", "columns": columns, "rows": rows}


def commands(record: RunRecord) -> str:
    """Return the commands that make the same output."""
    lines = [
        as_line(prune_words(each.asked, str(record.output), each.first_block if each.is_branch else None))
        for each in record.decided
    ]
    return "\n".join(lines)


def surroundings(record: RunRecord) -> Rows:
    """Return what else the bytes depend on."""
    made = record.decided[-1].fingerprint
    return [
        ("source sha256", made["checkpoint"]),
        ("versions", ", ".join(f"{name} {version}" for name, version in made["versions"].items())),
        ("machine", ", ".join(f"{name} {value}" for name, value in made["machine"].items() if name != "flags")),
    ]


def stamp(at: float) -> str:
    """Return a time of this machine's clock."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))


def _column(title: str, number: bool = False, digits: int = 0) -> dict[str, Any]:
    return {"title": title, "number": number, "digits": digits}


def _in_brackets(options: dict[str, Any]) -> str:
    return f" ({', '.join(f'{key}={value}' for key, value in options.items())})" if options else ""
