"""The plan as a page that a person reads in a minute; on request with every phase and placement."""

from __future__ import annotations

from collections.abc import Iterator

from rich.text import Text

from billhook.layerworkers.tasks import Placement
from billhook.orchestrator.allocation import UNIFORM
from billhook.orchestrator.layout import Linear
from billhook.orchestrator.pages import GAP, TIERS, Row, page, usage
from billhook.orchestrator.placing import Arrangement
from billhook.orchestrator.plan_warnings import plan_warnings
from billhook.orchestrator.planning import PLENTY_BYTES, Plan, estimate, kinds_of_blocks
from billhook.orchestrator.request import Request
from billhook.orchestrator.timing import BlockTime
from billhook.orchestrator.units import duration, gibibytes


def plan_page(plan: Plan, details: bool = False) -> Text:
    """Return the plan for a person. details: also every phase, placement and option."""
    rest = _details(plan) if details else [("", Text("more: --details, --json", "dim"))]
    warnings = list(_warned(plan))
    return page([*_what(plan), GAP, *_takes(plan), *([GAP, *warnings] if warnings else []), GAP, *rest])


def plan_as_text(plan: Plan, details: bool = False) -> str:
    """Return the same without colours."""
    return plan_page(plan, details).plain


def _what(plan: Plan) -> Iterator[Row]:
    """Yield what is pruned, what is left, and how."""
    request, recipe = plan.request, plan.request.recipe
    checkpoint, blocks = request.model.checkpoint, request.model.layout.blocks
    chosen = [linear for linears in request.linears for linear in linears]
    weights = sum(linear.shape[0] * linear.shape[1] for linear in chosen)
    yield "model", str(checkpoint.folder)
    yield "", f"{len(blocks)} blocks, {gibibytes(checkpoint.size_bytes)} in {len(checkpoint.shards)} shard(s)"
    sparsity = f"sparsity {float(request.pattern.sparsity):g}"
    yield "method", f"{recipe.method}, pattern {request.pattern}, {sparsity}{_allocated(request)}"
    for regex, method in recipe.methods.items():
        yield "", f"{method} for {regex}"
    yield "prunes", f"{len(chosen)} linears, {weights:,} weights: {', '.join(_kinds(chosen))}"
    if experts := [block.experts for block in blocks if block.experts]:
        yield "experts", f"{max(experts)} in {len(experts)} block(s), {_fitted(request)}"
    yield "skips", "what is outside the blocks: embeddings, head, norms"
    if request.skipped:
        kinds = ", ".join(_kinds(list(request.skipped)))
        yield "", f"{len(request.skipped)} linears, by --include and --exclude: {kinds}"
    if request.other_matrices:
        first = request.other_matrices[0]
        yield (
            "",
            f"{len(request.other_matrices)} matrices that are no linears, as routers and convolutions: {first} ...",
        )
    if request.unknown:
        yield "", f"{len(request.unknown)} tensors in blocks that the model does not use: {request.unknown[0]} ..."
    if request.samples:
        source = recipe.calibration or "(not given)"
        yield "calibrates", f"{request.samples} samples of {recipe.seqlen} tokens from {source}"
    where = f"the Ray cluster at {plan.workers.address}" if plan.workers.address else "this machine"
    if plan.supposed.device:
        where = f"nodes with one {plan.supposed.device} each, as data sheets have it"
    told = f"{plan.workers.count} {recipe.device} worker(s) of {recipe.threads} thread(s), {recipe.dtype}, on {where}"
    yield "runs", told


def _takes(plan: Plan) -> Iterator[Row]:
    """Yield memory, disk and time."""
    taken, budgets = estimate(plan), plan.budgets
    limits = {
        "ram": None if budgets.ram == PLENTY_BYTES else budgets.ram,
        "vram": budgets.vram,
        "disk": budgets.disk,
    }
    on_gpu = plan.request.recipe.device == "cuda"
    for tier, title in TIERS.items():
        if tier == "vram" and not on_gpu:
            continue
        unknown = tier == "disk" and limits[tier] is None
        note = {"ram": "all processes together", "vram": "each worker"}.get(tier, "output and scratch")
        yield (
            title,
            Text(f"{gibibytes(taken.peak_bytes[tier])}, {note}")
            if unknown
            else usage(taken.peak_bytes[tier], limits[tier], note),
        )
    if not on_gpu and budgets.vram is not None:
        yield "of RAM", Text.assemble(usage(plan.arrangement.peak.device, budgets.vram, "each worker's device part"))
    if plan.misfit:
        yield "", Text(f"DOES NOT FIT: {plan.misfit}", "bold red")
    kinds = kinds_of_blocks(plan)
    longest = max(kinds, key=lambda time: time.seconds * len(kinds[time]))
    each = (
        f"{len(plan.times)} blocks of {duration(longest.seconds)}" if len(kinds) == 1 else f"{len(plan.times)} blocks"
    )
    yield "time", f"about {duration(taken.seconds)}: {each}, most of it {longest.limit}"
    moved = f", moves {gibibytes(taken.moved_bytes)} between workers" if plan.workers.count > 1 else ""
    yield "traffic", f"reads {gibibytes(taken.bytes_read)}, writes {gibibytes(taken.bytes_written)}{moved}"


def _warned(plan: Plan) -> Iterator[Row]:
    for warning in plan_warnings(plan):
        yield "warning", Text(warning, "yellow")


def _details(plan: Plan) -> Iterator[Row]:
    """Yield what only a curious person reads."""
    taken, request, device = estimate(plan), plan.request, plan.request.recipe.device
    if options := ", ".join(f"{key}={value}" for key, value in request.options.items()):
        yield "options", options
    yield "computes", f"{taken.flops:.3g} FLOP"
    for time, indices in kinds_of_blocks(plan).items():
        yield "", f"{len(indices)} block(s): {_spent(time)}"
    if plan.workers.count > 1:
        yield "moves", _moved(plan, taken.moved_bytes)
    for number, need in enumerate(_phases(plan)):
        yield "phases" if number == 0 else "", need
    yield "keeps", f"activations on {_tier(plan.arrangement.activations, device)}; {_kept(plan)}"
    for line in _ways(plan.arrangement, device):
        yield "", line
    for number, (name, made) in enumerate(plan.elsewhere.items()):
        yield "elsewhere" if number == 0 else "", f"with one worker on {name}: {_elsewhere(made)}"


def _kinds(linears: list[Linear]) -> list[str]:
    """Return each kind of linear once, with its shape."""
    return list(dict.fromkeys(f"{linear.kind} {linear.shape[0]}x{linear.shape[1]}" for linear in linears))


def _allocated(request: Request) -> str:
    if request.recipe.allocation == UNIFORM:
        return ""
    if request.allocation is None:
        name = request.recipe.allocation
        return f", allocated by {name} when it runs; planned as if uniform, without the reading that it takes"
    shares = [float(request.allocation.sparsity_of(name)) for name in request.allocation.removed]
    text = f", allocated by {request.allocation.name}: {min(shares):.3f} to {max(shares):.3f}"
    if not request.allocation.by_row:
        return text
    rows = [request.allocation.rows_of(name) for name in request.allocation.removed]
    return f"{text}, rows {min(low for low, _ in rows):.3f} to {max(high for _, high in rows):.3f}"


def _fitted(request: Request) -> str:
    """Return which tokens experts are fitted to."""
    recipe, fallback = request.recipe, request.recipe.expert_fallback
    if fallback == "pool" and not request.model.skeleton.can_pool:
        fallback = "magnitude"
    if not request.samples:
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
