"""What it takes to prune feed-forward networks in turns with what flows through them, from shapes.

The arithmetic of :mod:`billhook.layerworkers.auxiliaries`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from billhook.layerworkers.errors import OptionError
from billhook.layerworkers.methods import Solver
from billhook.layerworkers.reduction import node_count
from billhook.layerworkers.scratch import BAND_BYTES
from billhook.layerworkers.statistics import Statistic, with_deviations
from billhook.layerworkers.tasks import Placement
from billhook.orchestrator.job import BlockWork, Job
from billhook.orchestrator.layout import Linear
from billhook.orchestrator.model import Model
from billhook.orchestrator.needs import Need, at_tier
from billhook.orchestrator.recipe import Recipe

ENTRIES_AT_ONCE = 40
"""Numbers in float32 for each channel between the linears and token of a sample, while its auxiliaries are moved: half
of them are alive at once, and the others what the C library has not given back."""


def check_turns(
    recipe: Recipe, model: Model, chosen: Sequence[Sequence[Linear]], solver_of: Callable[[Linear], Solver]
) -> None:
    """Check that the feed-forward networks can be pruned in turns where a method asks for it.

    Raises:
        OptionError: where not.
    """
    for block, linears in zip(model.layout.blocks, chosen, strict=True):
        asking = [each for each in linears if solver_of(each).method.alternation is not None]
        if not asking:
            continue
        flag = f"--method {solver_of(asking[0]).method.name}"
        if recipe.collected is not None:
            raise OptionError(
                f"{flag}: goes back to the samples, of which --collected runs none; use sparsegpt, or 'billhook prune'"
            )
        if recipe.correction:
            raise OptionError(
                f"--correction {recipe.correction:g}: {flag} fits feed-forward networks to what the dense ones make of "
                "the same input, so that nothing is taken back; say --correction 0, or use sparsegpt"
            )
        if not block.feed_forward:
            raise OptionError(
                f"{flag}: block {block.index} of {model.checkpoint.folder} has no feed-forward network of a known "
                "form: two linears with an activation between, or three of which one is multiplied by another's "
                "activation, and no experts; use sparsegpt, with --method-for where it is only some blocks"
            )
        own = {each.name for each in asking} & set(block.feed_forward)
        if own and (left := [each for each in block.feed_forward if each not in own]):
            raise OptionError(
                f"{flag}: fits {', '.join(block.feed_forward)} of a block to each other, of which {', '.join(left)} is "
                f"not among its linears in block {block.index}; use it for all of them or for none"
            )


def refit_statistic(linear: Linear) -> Statistic:
    """Return what is summed for a linear that is refitted."""
    return with_deviations(linear.shape[0])


def copies_bytes(job: Job, facts: BlockWork) -> int:
    """Return the bytes of the dense weights that are kept beside those that change."""
    return sum(linear.shape[0] * linear.shape[1] * linear.item_bytes for linear in job.in_turns(facts))


def turns_phases(
    job: Job,
    facts: BlockWork,
    placement: Placement,
    activations: str,
    ranges: Sequence[tuple[int, int]],
    most_waiting: Sequence[int],
    own_samples: Sequence[int],
) -> Iterator[tuple[str, list[Need]]]:
    """Yield each phase of it with what every worker needs, beside block and hidden states.

    ranges: each worker's partitions. most_waiting: the most of a total's partial sums that wait for their siblings.
    """
    linears = job.in_turns(facts)
    if not linears:
        return
    tokens, item = job.recipe.seqlen or 0, getattr(torch, job.recipe.dtype).itemsize
    outputs, between = linears[-1].shape
    entering = linears[0].shape[1]
    weights = Need(4 * sum(linear.shape[0] * linear.shape[1] for linear in linears), 0, 0)
    kept = item * tokens * (entering + outputs + between * (len(linears) - 1))
    held = [at_tier(activations, samples * kept) + weights for samples in own_samples]
    totals = [refit_statistic(linear).size_bytes(linear.shape[1]) for linear in linears]
    moving = 4 * tokens * (ENTRIES_AT_ONCE * between + 6 * (entering + outputs)) + 24 * outputs**2
    yield (
        "auxiliaries",
        [
            held[rank]
            + weights
            + Need(max(moving + sum(totals) * (samples > 0), facts.footprint.running_bytes), 0, 0)
            + at_tier(placement.statistics, most_waiting[rank] * sum(totals))
            for rank, samples in enumerate(own_samples)
        ],
    )
    working = max(_refitting(job, linear, total) for linear, total in zip(linears, totals, strict=True))
    rows = max(linear.shape[0] * linear.shape[1] * linear.item_bytes for linear in linears)
    bands = (len(own_samples) + 1) * BAND_BYTES if len(own_samples) > 1 else 0
    yield (
        "refitting",
        [
            held[rank]
            + at_tier(placement.statistics, node_count(*partitions) * sum(totals))
            + Need(working + bands, 2 * rows, 0)
            for rank, partitions in enumerate(ranges)
        ],
    )


def _refitting(job: Job, linear: Linear, total: int) -> int:
    """Return what refitting and pruning all rows of a linear takes, given the bytes of its sums."""
    rows, columns = linear.shape
    gram = 4 * columns**2
    copies = 3 * gram if job.recipe.device != "cpu" else 0  # torch factorises into copies
    dense = 3 * 4 * rows * columns
    return total + 2 * gram + copies + dense + job.solver(linear).method.extra_bytes(rows, columns)


def moving_flops(job: Job, facts: BlockWork, tokens: int) -> float:
    """Return what moving the auxiliaries of so many tokens computes, in float32, without the sums."""
    how, linears = job.alternation, job.in_turns(facts)
    if how is None or not linears:
        return 0.0
    entries, last = sum(each.shape[0] * each.shape[1] for each in linears), linears[-1].shape
    epoch = 2.0 * tokens * (2 * entries + last[0] * last[1] + last[0] ** 2) + 2.0 * last[0] ** 3
    return 2.0 * tokens * entries + how.epochs * epoch
