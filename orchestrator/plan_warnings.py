"""What of a plan its user should think about before the run: nothing that would stop it."""

from __future__ import annotations

from collections.abc import Iterator

from billhook.layerworkers.patterns import NM
from billhook.orchestrator.planning import PLENTY_BYTES, Plan, estimate

NEARLY_FULL = 0.9
"""Share of a budget from which a plan is said to be close to it."""

TINY_TOKENS = 4096
"""With fewer a calibration is called tiny; 128 samples of 2048 tokens are what papers use."""

FEW_TOKENS_PER_CHANNEL = 4.0
"""With fewer a Gram matrix is mostly noise, with fewer than one it is singular."""

HIGH_SPARSITY = 0.7
"""From here on one-shot pruning loses most of a model, by the figures of README.md."""

MAGNITUDE_SPARSITY = 0.5
"""From here on magnitude alone does."""


def plan_warnings(plan: Plan) -> tuple[str, ...]:
    """Return one sentence for each thing that may not be as the user means it."""
    return (*_calibration(plan), *_recipe(plan), *_budgets(plan))


def _calibration(plan: Plan) -> Iterator[str]:
    request, recipe = plan.request, plan.request.recipe
    if not request.samples:
        return
    if recipe.calibration is None:
        yield f"--calibration is not given: prune needs it for {recipe.method}"
    elif recipe.calibration == "random":
        yield "random tokens tell nothing of text: the result is for trials of speed and memory only"
    tokens = request.samples * (recipe.seqlen or 0)
    if tokens < TINY_TOKENS:
        yield f"a tiny calibration of {tokens} tokens: 128 samples of 2048 are usual"
    ratios = {
        (linear.kind, linear.shape[1]): tokens * block.groups[linear.group].share / linear.shape[1]
        for block, linears in zip(request.model.layout.blocks, request.linears, strict=True)
        for linear in linears
        if (statistic := request.solver_of(linear).method.statistic) is not None and statistic.dimensions == 2
    }
    if not ratios:
        return
    kind, channels = min(ratios, key=lambda each: ratios[each])
    per_channel = ratios[kind, channels]
    if per_channel < FEW_TOKENS_PER_CHANNEL:
        why = "is singular" if per_channel < 1 else "is mostly noise"
        yield (
            f"{per_channel:.2g} tokens for each of the {channels} channels that enter {kind}: the Gram matrix that "
            f"{recipe.method} solves with {why}; take more --samples"
        )


def _recipe(plan: Plan) -> Iterator[str]:
    request, recipe = plan.request, plan.request.recipe
    pattern, sparsity = request.pattern, float(request.pattern.sparsity)
    if isinstance(pattern, NM) and str(pattern) != "2:4":
        yield f"the pattern {pattern}: the sparse units of GPUs take 2:4 only"
    if recipe.method == "magnitude" and sparsity >= MAGNITUDE_SPARSITY:
        yield f"magnitude looks at no activations: at sparsity {sparsity:g} other methods lose far less"
    elif sparsity >= HIGH_SPARSITY:
        yield f"sparsity {sparsity:g}: pruned at one stroke, models lose most of their quality from 0.7 on"


def _budgets(plan: Plan) -> Iterator[str]:
    if plan.misfit is not None:
        return
    peaks, budgets = estimate(plan).peak_bytes, plan.budgets
    for tier, limit in (("vram", budgets.vram), ("ram", budgets.ram), ("disk", budgets.disk)):
        if limit is not None and limit != PLENTY_BYTES and peaks[tier] >= NEARLY_FULL * limit:
            yield f"--{tier} is nearly full: {peaks[tier] / limit:.0%} of the budget are planned with"
