"""How long a block takes, from shapes and rates, and what it takes longest for.

A block's time is that of its slowest worker: what it computes, and what goes through the busiest connection while all
wait. Files are read and written meanwhile. Not counted are products of activations with each other, and what is done
entry by entry: they are part of what the rates promise too much.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from billhook.kernels.gram import cpu_multiplies_bfloat16
from billhook.layerworkers.reconstruction import BATCH_PARTITIONS
from billhook.layerworkers.reduction import even_ranges
from billhook.layerworkers.sharing import Shared, share_out_stage, shared_of
from billhook.layerworkers.statistics import Statistic
from billhook.layerworkers.traffic import (
    NOTHING,
    Matrix,
    Traffic,
    reduced_squares_traffic,
    squares_traffic,
    stage_traffic,
    tuning_traffic,
)
from billhook.orchestrator.job import BlockWork, Job, Stage
from billhook.orchestrator.layout import Linear
from billhook.orchestrator.probe import Rates
from billhook.orchestrator.recipe import Recipe
from billhook.orchestrator.turns import moving_flops, refit_statistic


@dataclass(frozen=True)
class Connection:
    """What lies between the workers."""

    bandwidth_bytes: float
    """Per second, into or out of one worker."""
    apart: bool
    """Whether each is on a node of its own, with a disk of its own to read from; else they share one."""


@dataclass(frozen=True)
class BlockTime:
    """Seconds of one block, of the worker that has most to do."""

    forward: float
    statistics: float
    factors: float
    """Factorisations: of each input on one worker, while the others wait, unless they have inputs of their own."""
    solving: float
    moving: float
    """What workers send each other."""
    files: float
    """Reading the block and writing it, while all the rest goes on."""
    flops: float
    """Of all workers together."""
    moved_bytes: int
    """Of all workers together."""

    @property
    def parts(self) -> dict[str, float]:
        """What the time is spent on."""
        return {name: getattr(self, name) for name in ("forward", "statistics", "factors", "solving", "moving")}

    @property
    def seconds(self) -> float:
        """All together."""
        return max(sum(self.parts.values()), self.files)

    @property
    def limit(self) -> str:
        """What takes longest."""
        parts = self.parts
        return "files" if self.files >= sum(parts.values()) else max(parts, key=lambda name: parts[name])


@dataclass(frozen=True)
class _Flops:
    """What is computed for one block, by all workers together."""

    forward: float
    """In the compute dtype, as the statistics on a GPU; the others in float32."""
    statistics: float
    factors: float
    solving: float
    moving: float
    """Of auxiliaries."""


def _flops(job: Job, facts: BlockWork) -> _Flops:
    recipe = job.recipe
    tokens, on_gpu = job.samples * (recipe.seqlen or 0), recipe.device != "cpu"
    times = 1 if job.rounds is None else 1 + job.rounds.count
    epochs, in_turns = _epochs(job), job.in_turns(facts)
    inputs = [
        (linears[0], job.statistic(facts, linears), job.shared(facts, linears)) for linears in facts.groups.values()
    ]
    return _Flops(
        (passes(job) - (0 if in_turns else _again(job))) * facts.forward_flops(tokens),
        times
        * sum(
            facts.share(first) * statistic.flops(tokens, first.shape[1], on_gpu)
            for first, statistic, _ in inputs
            if statistic is not None
        )
        + epochs * sum(refit_statistic(each).flops(tokens, each.shape[1], on_gpu) for each in in_turns),
        sum(shared.flops for _, _, shared in inputs)
        + epochs * sum(_refit_shared(job, each).flops for each in in_turns),
        times * sum(job.work(linear).flops for linear in facts.linears)
        + epochs * sum(job.work(linear).flops for linear in in_turns),
        moving_flops(job, facts, tokens),
    )


def _epochs(job: Job) -> int:
    """Return how often feed-forward networks are pruned in turns."""
    return 0 if job.alternation is None else job.alternation.epochs


def _again(job: Job) -> int:
    """Return how often more a sample is run through a block whose feed-forward network is pruned in turns."""
    return 0 if job.alternation is None else 2


def _refit_shared(job: Job, linear: Linear) -> Shared:
    """Return what the rows of a linear that is refitted share."""
    return shared_of([job.solver(linear).method], linear.shape[1], linear.shape[0])


def _statistics_rate(recipe: Recipe, rates: Rates) -> float:
    if recipe.device == "cpu":
        exact = recipe.dtype == "bfloat16" and cpu_multiplies_bfloat16()
    else:
        exact = getattr(torch, recipe.dtype).itemsize == 2  # tensor cores, summing in float32
    return rates.flops if exact else rates.float32_flops


def passes(job: Job) -> float:
    """Return how often a sample is run through a block, on average; forward and backward count three times."""
    recipe = job.recipe
    solving = 2 if recipe.fit == "dense-block" or recipe.correction else 1
    tuning = 1 + (not recipe.correction) + 3 * recipe.reconstruct if recipe.reconstruct else 0
    tuning += _again(job)
    gradients = 0.0 if job.gradients is None else 4 * job.gradients.samples / max(1, job.samples)
    if (rounds := job.rounds) is None:
        return solving + tuning + gradients
    tuned = min(1.0, rounds.samples / max(1, job.samples))
    return solving + tuning + gradients + 1 + 3 + rounds.count * (solving + 3 * tuned)


def block_time(job: Job, facts: BlockWork, workers: int, rates: Rates, connection: Connection) -> BlockTime:
    """Return how long one block takes ``workers`` workers, where there is memory for everything."""
    size, flops = job.recipe.partition_samples, _flops(job, facts)
    own = [min(stop * size, job.samples) - start * size for start, stop in even_ranges(job.partitions, workers)]
    share = max(own) / job.samples if job.samples else 0.0
    traffic, solving, factors = NOTHING, 0.0, 0.0
    for stage in facts.stages(0):
        statistics = [job.statistic(facts, linears) for linears in stage]
        solved, factored, moved = _stage_time(job, stage, statistics, workers, rates)
        solving, factors, traffic = solving + solved, factors + factored, traffic + moved
    for linear in job.in_turns(facts):
        solved, factored, moved = _stage_time(job, [[linear]], [refit_statistic(linear)], workers, rates)
        again = _epochs(job)
        solving, factors, traffic = solving + again * solved, factors + again * factored, traffic + moved * again
    item = getattr(torch, job.recipe.dtype).itemsize
    if (rounds := job.rounds) is not None:
        solving, traffic = solving * (1 + rounds.count), traffic * (1 + rounds.count)
        tuned = [Matrix(*linear.shape, 4) for linear in job.in_rounds(facts)]
        first = min(job.partitions, -(-rounds.samples // size))
        traffic += tuning_traffic(tuned, -(-first // BATCH_PARTITIONS), item, workers) * rounds.count
        traffic += squares_traffic(tuned, job.partitions, workers)
    if job.gradients is not None:
        matrices = [Matrix(*linear.shape, 4) for linear in job.in_gradients(facts)]
        traffic += reduced_squares_traffic(matrices, -(-job.gradients.samples // size), workers)
    if job.recipe.reconstruct:
        steps = job.recipe.reconstruct * -(-job.partitions // BATCH_PARTITIONS)
        tuned = [Matrix(*linear.shape, linear.item_bytes) for linear in facts.linears]
        traffic += tuning_traffic(tuned, steps, item, workers)
    if workers > 1 and job.sums:
        traffic += Traffic(0, 0, facts.routings)
    on_disk = sum(tensor.entry.size_bytes for tensor in facts.block.tensors)
    return BlockTime(
        share * flops.forward / rates.flops,
        share * flops.statistics / _statistics_rate(job.recipe, rates),
        factors,
        solving + share * flops.moving / rates.float32_flops,
        traffic.busiest_bytes / connection.bandwidth_bytes + traffic.exchanges * job.pace.exchange_seconds,
        ((1 if connection.apart else workers) * (1 if job.gradients is None else 3) + 1) * on_disk / rates.disk_bytes,
        flops.forward + flops.statistics + flops.factors + flops.solving + flops.moving,
        traffic.moved_bytes,
    )


def _stage_time(
    job: Job, stage: Stage, statistics: Sequence[Statistic | None], workers: int, rates: Rates
) -> tuple[float, float, Traffic]:
    """Return how long a stage's linears are solved, after how long a factorisation, and what is moved for it."""
    partition_rows = job.recipe.partition_rows or 0
    works = [[job.work(linear) for linear in linears] for linears in stage]
    shared = [
        shared_of(
            [job.solver(linear).method for linear in linears],
            linears[0].shape[1],
            0 if statistic is None else statistic.deviations,
        )
        for linears, statistic in zip(stage, statistics, strict=True)
    ]
    seconds, factoring = [0.0] * workers, [0.0] * workers
    shares = share_out_stage(works, shared, workers, partition_rows, job.pace)
    for linears, work, common, ranges_of in zip(stage, works, shared, shares, strict=True):
        for linear, each, ranges in zip(linears, work, ranges_of, strict=True):
            solver = job.solver(linear)
            launching = solver.method.launches(linear.shape[1], solver.options) * rates.launch_seconds
            for rank, (start, stop) in enumerate(ranges):
                if start < stop:
                    seconds[rank] += each.flops * (stop - start) / each.rows / rates.float32_flops + launching
        first = next(rank for rank in range(workers) if any(rows[rank][0] < rows[rank][1] for rows in ranges_of))
        factoring[first] += common.flops / rates.float32_flops
    matrices = [[Matrix(*linear.shape, linear.item_bytes) for linear in linears] for linears in stage]
    solvers = [[job.solver(linear) for linear in linears] for linears in stage]
    traffic = stage_traffic(
        matrices, statistics, solvers, job.pattern, job.partitions, partition_rows, workers, job.pace
    )
    return max(seconds), max(factoring), traffic
