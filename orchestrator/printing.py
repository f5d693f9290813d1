"""Plans, inspections and methods as text for people and as JSON for programs."""

from __future__ import annotations

import dataclasses
from typing import Any

from billhook.layerworkers.methods import METHODS, REFINEMENTS, Method, Refinement, method_named
from billhook.layerworkers.tasks import Placement
from billhook.orchestrator.allocation import ALLOCATORS, UNIFORM, Allocation
from billhook.orchestrator.inspection import Inspection
from billhook.orchestrator.layout import Linear
from billhook.orchestrator.placing import Arrangement
from billhook.orchestrator.planning import PLENTY_BYTES, Plan, estimate
from billhook.orchestrator.request import Request
from billhook.orchestrator.timing import BlockTime


def gibibytes(size_bytes: float) -> str:
    """Return a size as text, in GiB from 0.1 GiB up and in MiB below."""
    return f"{size_bytes / 2**30:.2f} GiB" if size_bytes >= 2**30 / 10 else f"{size_bytes / 2**20:.1f} MiB"


def plan_as_json(plan: Plan) -> dict[str, Any]:
    """Return the plan's document."""
    request = plan.request
    return {
        "model": str(request.model.checkpoint.folder),
        "method": request.recipe.method,
        "options": request.options,
        "pattern": str(request.pattern),
        "sparsity": float(request.pattern.sparsity),
        "dtype": request.recipe.dtype,
        "device": request.recipe.device,
        "workers": plan.workers.count,
        "samples": request.recipe.samples if request.method.statistic is not None else 0,
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
            for time, indices in _kinds_of_blocks(plan).items()
        ],
        "misfit": plan.misfit,
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


def _kinds_of_blocks(plan: Plan) -> dict[BlockTime, list[int]]:
    """Return the blocks that take the same, by what they take."""
    kinds: dict[BlockTime, list[int]] = {}
    for index, time in enumerate(plan.times):
        kinds.setdefault(time, []).append(index)
    return kinds


def plan_as_text(plan: Plan) -> str:
    """Return the plan as a page for a person."""
    taken, request = estimate(plan), plan.request
    recipe = request.recipe
    chosen = [linear for linears in request.linears for linear in linears]
    weights = sum(linear.shape[0] * linear.shape[1] for linear in chosen)
    options = ", ".join(f"{key}={value}" for key, value in request.options.items())
    lines = [
        f"model      {request.model.checkpoint.folder}",
        f"           {len(request.model.layout.blocks)} blocks, {gibibytes(request.model.checkpoint.size_bytes)} in "
        f"{len(request.model.checkpoint.shards)} shard(s)",
        f"method     {recipe.method}{f' ({options})' if options else ''}, pattern {request.pattern}, "
        f"sparsity {float(request.pattern.sparsity):g}" + _allocated(request),
        f"prunes     {len(chosen)} linears, {weights:,} weights: {', '.join(_kinds(chosen))}",
        f"leaves     {len(request.skipped)} linears in the blocks"
        + (f": {', '.join(_kinds(list(request.skipped)))}" if request.skipped else ""),
    ]
    if experts := [block.experts for block in request.model.layout.blocks if block.experts]:
        lines.append(f"experts    {max(experts)} in {len(experts)} block(s), {_fitted(request)}")
    if request.other_matrices:
        lines.append(
            f"           {len(request.other_matrices)} matrices that are no linears: {request.other_matrices[0]} ..."
        )
    if request.unknown:
        lines.append(
            f"copies     {len(request.unknown)} tensors in blocks that the model does not use: {request.unknown[0]} ..."
        )
    if request.method.statistic is not None:
        lines.append(
            f"calibrates {recipe.samples} samples of {recipe.seqlen} tokens from {recipe.calibration or '(not given)'}"
        )
    where = f"the Ray cluster at {plan.workers.address}" if plan.workers.address else "this machine"
    if plan.supposed.device:
        where = f"nodes with one {plan.supposed.device} each, as data sheets have it"
    lines += [
        f"runs       {plan.workers.count} {recipe.device} worker(s) of {recipe.threads} thread(s), "
        f"{recipe.dtype}, on {where}",
        f"reads      {gibibytes(taken.bytes_read)}, writes {gibibytes(taken.bytes_written)}",
        *([f"moves      {_moved(plan, taken.moved_bytes)}"] if plan.workers.count > 1 else []),
        f"computes   {taken.flops:.3g} FLOP, about {_duration(taken.seconds)}",
        *(f"           {len(indices)} block(s): {_spent(time)}" for time, indices in _kinds_of_blocks(plan).items()),
        f"budgets    {_budgets(plan)}",
        *([f"           DOES NOT FIT: {plan.misfit}"] if plan.misfit else []),
        f"peaks      RAM {gibibytes(taken.peak_bytes['ram'])}, "
        f"GPU {gibibytes(taken.peak_bytes['vram'])}, disk {gibibytes(taken.peak_bytes['disk'])}",
        *(f"           {need}" for need in _phases(plan)),
        f"keeps      activations on {_tier(plan.arrangement.activations, recipe.device)}; {_kept(plan)}",
        *(f"           {line}" for line in _ways(plan.arrangement, recipe.device)),
    ]
    if plan.elsewhere:
        lines.append("elsewhere  with one worker:")
    for name, made in plan.elsewhere.items():
        lines.append(f"           {name}: {_elsewhere(made)}")
    return "\n".join(lines)


def _fitted(request: Request) -> str:
    """Return which tokens experts are fitted to."""
    recipe, fallback = request.recipe, request.recipe.expert_fallback
    if fallback == "pool" and not request.model.skeleton.can_pool:
        fallback = "magnitude"
    if method_named(recipe.method).statistic is None:
        return "each by itself"
    if recipe.route == "all":
        return "each fitted to all tokens"
    instead = {
        "pool": "fitted to all tokens of its layer",
        "magnitude": "pruned by magnitude",
        "dense": "left dense",
    }[fallback]
    return (
        "each fitted to the tokens that are sent to it; with fewer than "
        f"{recipe.expert_tokens:g} for each channel of its widest input, {instead}"
    )


def _moved(plan: Plan, moved_bytes: int) -> str:
    rate = plan.connection.bandwidth_bytes / 1e9
    return f"{gibibytes(moved_bytes)} from worker to worker, at {rate:.3g} GB/s into or out of each"


def _spent(time: BlockTime) -> str:
    parts = ", ".join(f"{name} {seconds:.3g}" for name, seconds in time.parts.items() if seconds)
    return f"{time.seconds:.3g} s each: {parts}; meanwhile files {time.files:.3g}; {time.limit} limit"


def _budgets(plan: Plan) -> str:
    budgets, on_gpu = plan.budgets, plan.request.recipe.device == "cuda"
    parts = ["RAM as needed" if budgets.ram == PLENTY_BYTES else f"RAM {gibibytes(budgets.ram)}"]
    if budgets.vram is not None:
        parts.append(f"{'GPU' if on_gpu else 'device part of RAM'} {gibibytes(budgets.vram)}")
    if budgets.disk is not None:
        parts.append(f"disk {gibibytes(budgets.disk)}")
    return ", ".join(parts)


def _phases(plan: Plan) -> list[str]:
    on_cpu = plan.request.recipe.device == "cpu"
    return [
        f"{name}: RAM {gibibytes(need.ram)}"
        + ("" if on_cpu else f", GPU {gibibytes(need.device)}")
        + (f", scratch {gibibytes(need.disk)}" if need.disk else "")
        for name, need in plan.arrangement.phases.items()
    ]


def _ways(arrangement: Arrangement, device: str) -> list[str]:
    """Return how the blocks are worked on, each way once with how many blocks it is for."""
    counts: dict[Placement, int] = {}
    for placement in arrangement.placements:
        counts[placement] = counts.get(placement, 0) + 1
    return [
        f"{count} block(s): intermediates {placement.intermediates}"
        + (f" to {_tier(placement.spill_to, device)}" if placement.intermediates == "spill" else "")
        + f", statistics on {_tier(placement.statistics, device)}, "
        + ("the next block read meanwhile" if placement.read_ahead else "no reading ahead")
        + (f", {placement.experts_at_once} experts at once" if placement.experts_at_once else "")
        for placement, count in counts.items()
    ]


def _kept(plan: Plan) -> str:
    if not plan.keep_every:
        return "no inputs for a resume: it replays all finished blocks"
    often = "each block" if plan.keep_every == 1 else f"every {plan.keep_every} blocks"
    return f"inputs for a resume after {often}, {gibibytes(plan.kept_bytes)} at most"


def _tier(tier: str, device: str) -> str:
    if tier == "device":
        return "the GPU" if device == "cuda" else "RAM"
    return {"ram": "RAM", "disk": "disk"}[tier]


def _elsewhere(made: Arrangement | None) -> str:
    if made is None:
        return "does not fit"
    gpu = f"GPU {gibibytes(made.peak.device)}, " if made.on_gpu else ""
    device = "cuda" if made.on_gpu else "cpu"
    scratch = f", scratch {gibibytes(made.peak.disk)}" if made.peak.disk else ""
    ways = "; ".join(_ways(made, device))
    return f"{gpu}RAM {gibibytes(made.peak.ram)}{scratch} (activations on {_tier(made.activations, device)}; {ways})"


def inspection_as_text(found: Inspection) -> str:
    """Return an inspection as a table."""
    width = max((len(fact.name) for fact in found.tensors), default=4)
    rows = [
        f"{fact.name:<{width}}  {'x'.join(map(str, fact.shape)):>14}  {fact.dtype:>5}  {fact.sparsity:8.4f}  "
        f"{fact.pattern}"
        for fact in found.tensors
    ]
    head = f"{'tensor':<{width}}  {'shape':>14}  {'dtype':>5}  {'sparsity':>8}  pattern"
    return "\n".join(
        [head, *rows, f"sparsity of the sparse matrices {found.sparsity:.4f}, {gibibytes(found.size_bytes)}"]
    )


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


def _allocated(request: Request) -> str:
    if request.recipe.allocation == UNIFORM:
        return ""
    if request.allocation is None:
        name = request.recipe.allocation
        return f", allocated by {name} when it runs; planned as if uniform, without the reading that it takes"
    shares = [float(request.allocation.sparsity_of(name)) for name in request.allocation.removed]
    return f", allocated by {request.allocation.name}: {min(shares):.3f} to {max(shares):.3f}"


def allocation_as_text(allocation: Allocation) -> str:
    """Return an allocation for a person: the linears of each kind, in the order of the blocks."""
    width = max(map(len, allocation.removed))
    rows = [f"{name:<{width}}  {float(allocation.sparsity_of(name)):8.4f}" for name in allocation.removed]
    return "\n".join([f"{'linear':<{width}}  sparsity", *rows, f"all together {float(allocation.sparsity):.4f}"])


def _kinds(linears: list[Linear]) -> list[str]:
    """Return each kind of linear once, with its shape."""
    return list(dict.fromkeys(f"{linear.kind} {linear.shape[0]}x{linear.shape[1]}" for linear in linears))


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
