"""Plans, inspections, evaluations and methods as text for people and as JSON for programs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from billhook.layerworkers.methods import METHODS, REFINEMENTS, Method, Refinement
from billhook.orchestrator.allocation import ALLOCATORS, Allocation
from billhook.orchestrator.evaluation import Evaluation
from billhook.orchestrator.inspection import Inspection
from billhook.orchestrator.placing import Arrangement
from billhook.orchestrator.plan_warnings import plan_warnings
from billhook.orchestrator.planning import Plan, estimate, kinds_of_blocks
from billhook.orchestrator.units import gibibytes


def plan_as_json(plan: Plan) -> dict[str, Any]:
    """Return the plan's document."""
    request = plan.request
    return {
        "model": str(request.model.checkpoint.folder),
        "method": request.recipe.method,
        "options": request.options,
        "methods": request.recipe.methods,
        "pattern": str(request.pattern),
        "sparsity": float(request.pattern.sparsity),
        "dtype": request.recipe.dtype,
        "device": request.recipe.device,
        "workers": plan.workers.count,
        "samples": request.samples,
        "seqlen": request.recipe.seqlen,
        "blocks": len(request.model.layout.blocks),
        "linears": [
            {"name": linear.disk_name, "shape": list(linear.shape), "block": block.index}
            for block, linears in zip(request.model.layout.blocks, request.linears, strict=True)
            for linear in linears
        ],
        "skipped": [*(linear.disk_name for linear in request.skipped), *request.other_matrices],
        "unknown": list(request.unknown),
        **dataclasses.asdict(estimate(plan)),
        "supposed": dataclasses.asdict(plan.supposed),
        "connection": dataclasses.asdict(plan.connection),
        "block_kinds": [
            {"blocks": len(indices), "first": indices[0], "seconds": time.seconds, "limit": time.limit}
            | dataclasses.asdict(time)
            for time, indices in kinds_of_blocks(plan).items()
        ],
        "misfit": plan.misfit,
        "warnings": list(plan_warnings(plan)),
        "keep_every": plan.keep_every,
        "budgets": dataclasses.asdict(plan.budgets),
        "rates": dataclasses.asdict(plan.rates),
        **_arrangement_as_json(plan.arrangement),
        "elsewhere": {
            name: None if made is None else _arrangement_as_json(made) for name, made in plan.elsewhere.items()
        },
    }


def _arrangement_as_json(arrangement: Arrangement) -> dict[str, Any]:
    return {
        "activations": arrangement.activations,
        "placements": [dataclasses.asdict(placement) for placement in arrangement.placements],
        "phases": {name: dataclasses.asdict(need) for name, need in arrangement.phases.items()},
        "peak": dataclasses.asdict(arrangement.peak),
    }


def inspection_as_text(found: Inspection) -> str:
    """Return an inspection as tables: of tensors, of blocks and of kinds, and what zeros would save."""
    names = [*(fact.name for fact in found.tensors), *(kind.name for kind in found.kinds)]
    width = max(map(len, names), default=4)
    lines = [f"{'tensor':<{width}}  {'shape':>14}  {'dtype':>7}  {'sparsity':>8}  pattern"]
    lines += [
        f"{fact.name:<{width}}  {'x'.join(map(str, fact.shape)):>14}  {fact.dtype:>7}  {fact.sparsity:8.4f}  "
        f"{fact.pattern}"
        for fact in found.tensors
    ]
    for title, groups in (("block", found.blocks), ("kind", found.kinds)):
        if groups:
            lines += ["", f"{title:<{width}}  {'matrices':>14}  {'size':>7}  {'sparsity':>8}  patterns"]
        lines += [
            f"{each.name:<{width}}  {each.tensors:>14}  {_short(each.sizes.stored_bytes):>7}  {each.sparsity:8.4f}  "
            f"{', '.join(each.patterns)}"
            for each in groups
        ]
    sizes = found.sizes
    return "\n".join(
        [
            *lines,
            "",
            f"sparsity of the sparse matrices {found.sparsity:.4f}",
            f"size as stored {gibibytes(sizes.stored_bytes)}; values and a bitmask would take "
            f"{gibibytes(sizes.bitmask_bytes)}, 2:4 matrices packed {gibibytes(sizes.packed_bytes)}",
        ]
    )


def _short(size_bytes: int) -> str:
    return gibibytes(size_bytes).replace("iB", "").replace(" ", "")


def methods_as_json() -> list[dict[str, Any]]:
    """Return the tables of methods, of refinements, which can follow one, and of allocators."""
    solvers: list[Method | Refinement] = [*METHODS.values(), *REFINEMENTS.values()]
    return [
        {
            "name": each.name,
            "kind": "refinement" if each.name in REFINEMENTS else "method",
            "source": each.source,
            "summary": each.summary,
            "statistics": [each.statistic.name] if each.statistic is not None else [],
            "options": {field.name: field.default for field in dataclasses.fields(each.options)},
        }
        for each in solvers
    ] + [
        {
            "name": each.name,
            "kind": "allocator",
            "source": each.source,
            "summary": each.summary,
            "statistics": [each.needs],
            "options": {field.name: field.default for field in dataclasses.fields(each.options)},
        }
        for each in ALLOCATORS.values()
    ]


_AS_GIVEN = {"method": "--method {}", "refinement": "--method METHOD+{}", "allocator": "--allocation {}"}


def methods_as_text() -> str:
    """Return the same tables for a person."""
    blocks = []
    for row in methods_as_json():
        lines = [f"{_AS_GIVEN[row['kind']].format(row['name'])}: {row['summary']}"]
        if row["source"]:
            lines.append(f"  source   {row['source']}")
        options = ", ".join(f"{name}={value}" for name, value in row["options"].items()) or "none"
        lines += [f"  needs    {', '.join(row['statistics']) or 'nothing'}", f"  options  {options}"]
        blocks.append("\n".join(lines))
    return "\n".join(blocks)


def allocation_as_text(allocation: Allocation) -> str:
    """Return an allocation for a person: the linears of each kind, in the order of the blocks."""
    width = max(map(len, allocation.removed))
    rows = [
        f"{name:<{width}}  {float(allocation.sparsity_of(name)):8.4f}"
        + ("  rows {:.4f} to {:.4f}".format(*allocation.rows_of(name)) if name in allocation.by_row else "")
        for name in allocation.removed
    ]
    return "\n".join([f"{'linear':<{width}}  sparsity", *rows, f"all together {float(allocation.sparsity):.4f}"])


def evaluation_as_text(found: Evaluation) -> str:
    """Return an evaluation as a line, and another where it is against a reference."""
    text = (
        f"perplexity {found.perplexity:.4f} on {found.windows} windows of {found.seqlen} tokens, "
        f"{found.seconds:.1f} s, peak memory {gibibytes(found.peak_bytes['ram'])}"
    )
    if found.against is None:
        return text
    return text + (
        f"\nagainst {found.against.reference} (perplexity {found.against.perplexity:.4f}): KL divergence "
        f"{found.against.divergence:.5f} nats per token, top-1 agreement {found.against.agreement:.2%}"
    )


def tasks_as_text(found: Mapping[str, Mapping[str, float]]) -> str:
    """Return the metrics of tasks, one a line."""
    return "\n".join(f"{task}  {metric}  {value:.4f}" for task, own in found.items() for metric, value in own.items())
