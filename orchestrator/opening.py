"""What is told when a run begins: what is planned, and what its user should think about."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

from billhook.orchestrator.events import RunBegun, Warned
from billhook.orchestrator.plan_warnings import plan_warnings
from billhook.orchestrator.planning import Plan, estimate


def opening(plan: Plan, blocks_done: int) -> Iterator[RunBegun | Warned]:
    """Yield the events with which a command begins, or goes on with, a run.

    blocks_done: by earlier commands.
    """
    yield _begun(plan, blocks_done)
    for warning in plan_warnings(plan):
        yield Warned(warning)


def _begun(plan: Plan, blocks_done: int) -> RunBegun:
    request, recipe, taken = plan.request, plan.request.recipe, estimate(plan)
    budgets = plan.budgets
    return RunBegun(
        str(request.model.checkpoint.folder),
        recipe.method,
        str(request.pattern),
        float(request.pattern.sparsity),
        recipe.device,
        recipe.dtype,
        request.samples,
        recipe.seqlen or 0,
        plan.workers.count,
        recipe.threads,
        len(request.model.layout.blocks),
        blocks_done,
        sum(map(len, request.linears)),
        taken.seconds,
        tuple(time.seconds for time in plan.times),
        tuple({**time.parts, "files": time.files} for time in plan.times),
        tuple(time.moved_bytes for time in plan.times),
        taken.peak_bytes,
        {name: asdict(need) for name, need in plan.arrangement.phases.items()},
        {"vram": budgets.vram, "ram": budgets.ram, "disk": budgets.disk},
        taken.bytes_read,
        taken.bytes_written,
    )
