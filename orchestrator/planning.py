"""The plan: how a request is met on this machine, and what that takes."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Unpack

from billhook.cluster.memory import own_bytes
from billhook.layerworkers.errors import InputError
from billhook.layerworkers.shards import TensorEntry
from billhook.layerworkers.tasks import BlockTask, LinearTask
from billhook.layerworkers.traffic import NOTHING, Matrix, Traffic, group_traffic
from billhook.orchestrator.budgets import VRAM_SHARE, Budgets, resolve_budgets
from billhook.orchestrator.checkpoint import Checkpoint
from billhook.orchestrator.keeping import keep_every
from billhook.orchestrator.layout import Linear
from billhook.orchestrator.model import Model, check_gpus, resolve_workers
from billhook.orchestrator.phases import BlockWork, Job, groups_of
from billhook.orchestrator.placing import Arrangement, DoesNotFitError, arrange
from billhook.orchestrator.probe import CPU_CORE, GPU, Rates, measured_rates
from billhook.orchestrator.recipe import Resources, RunOptions, read_options
from billhook.orchestrator.request import Request, make_request
from billhook.orchestrator.workers import Workers


@dataclass(frozen=True)
class Estimate:
    """What a run takes, predicted from shapes."""

    flops: float
    bytes_read: int
    bytes_written: int
    moved_bytes: int
    """From worker to worker, all together; each block's are measured by the run."""
    bytes_spilled: int
    """Most that lies in scratch files at once."""
    seconds: float
    """From a short measurement of products, disk and copies on this machine."""
    peak_bytes: dict[str, int]
    """vram of a worker, ram of this node, disk of output and scratch."""
    fits: bool
    """Whether the peaks are within the budgets; ``prune`` refuses to start where they are not."""


@dataclass(frozen=True)
class Plan:
    """How a request is met on this machine: no byte of the output depends on it."""

    request: Request
    resources: Resources
    workers: Workers
    budgets: Budgets
    rates: Rates
    own_bytes: int
    """Memory of a process that has imported the libraries."""
    arrangement: Arrangement
    """Where everything is kept."""
    keep_every: int
    """After how many blocks the inputs of the next are kept in the output; 0: never."""
    hidden_bytes: int
    """Of one sample's hidden state."""
    elsewhere: dict[str, Arrangement | None]
    """How one worker would do it on other kinds of machines; None where it cannot."""
    misfit: str | None
    """Why the budgets are too small and what would do; the arrangement is then made for what would do."""

    def task(self, index: int, output: Path, keep: TensorEntry | None = None) -> BlockTask:
        """Return what a worker is told about block ``index``.

        keep: where its outputs are to be kept.
        """
        request = self.request
        recipe, blocks = request.recipe, request.model.layout.blocks
        options = request.method.options(**request.options)
        return BlockTask(
            index,
            blocks[index].tensors,
            blocks[index].others,
            tuple(
                LinearTask(linear.disk_name, linear.name, request.pattern, recipe.method, options)
                for linear in request.linears[index]
            ),
            recipe.fit,
            str(output),
            recipe.partition_samples,
            request.partitions,
            recipe.partition_rows or 0,
            self.arrangement.placements[index],
            tuple(tensor for later in blocks[index + 1 : index + 2] for tensor in later.tensors),
            keep,
        )

    def keeps_inputs_of(self, index: int) -> bool:
        """Whether the inputs of block ``index`` are kept."""
        return (
            self.keep_every > 0 and 0 < index < len(self.request.model.layout.blocks) and index % self.keep_every == 0
        )

    @property
    def kept_bytes(self) -> int:
        """Bytes of kept inputs that lie on the disk at once: of the last committed block, and of the one under way."""
        return 2 * self.request.samples * self.hidden_bytes if self.keep_every else 0


def make_plan(request: Request, resources: Resources, output: Path | None = None) -> Plan:
    """Decide how a request is met.

    output: where the checkpoint will be written; its disk limits the run where no other limit is given. None: nothing
    will be.

    Raises:
        InputError: where no way of working fits the budgets, or the machine lacks what was asked for.
    """
    recipe, opened = request.recipe, request.model
    job = _job(request)
    useful = job.partitions if job.samples else 1
    here = resolve_workers("auto", opened.device, recipe.threads, useful)
    most = here if resources.workers == "auto" else resources.workers
    wanted = useful if resources.workers == "auto" and resources.address is not None else most
    check_gpus(most, opened.device, resources.address)
    own = own_bytes(os.getpid())  # before CUDA and the probe leave their traces, which a worker starts without
    budgets = resolve_budgets(resources.vram, resources.ram, resources.disk, opened.device, output, resources.scratch)
    rates = measured_rates(opened)
    work = block_work(opened, request.linears, recipe.seqlen or 0)
    counts = range(most, 0, -1) if resources.workers == "auto" else [most]
    per_node = None if resources.address is None else here
    size = output_bytes(opened.checkpoint)
    misfit, within = None, budgets
    while True:
        try:
            arrangement = arrange(job, work, within, rates, counts, own, _tiers(resources), size, per_node=per_node)
            break
        except DoesNotFitError as error:
            if output is not None:
                raise
            misfit, within = misfit or str(error), error.smallest
    hidden = work[0].footprint.hidden_bytes
    alone = resources.address is None
    return Plan(
        request,
        resources,
        Workers(arrangement.workers, recipe.threads, resources.address, arrangement.workers if alone else wanted),
        budgets,
        rates,
        own,
        arrangement,
        _cadence(request, resources, rates, arrangement, hidden, within.disk),
        hidden,
        _elsewhere(job, work, size, own) if output is None else {},
        misfit,
    )


def with_workers(plan: Plan, workers: int) -> Plan:
    """Return the plan with another number of workers, which there turned out to be: all else holds.

    Raises:
        InputError: where no way of working fits the budgets.
    """
    if workers == plan.arrangement.workers:
        return plan
    request, resources = plan.request, plan.resources
    opened = request.model
    useful = _job(request).partitions if request.samples else 1
    arrangement = arrange(
        _job(request),
        block_work(opened, request.linears, request.recipe.seqlen or 0),
        plan.budgets,
        plan.rates,
        [workers],
        plan.own_bytes,
        _tiers(resources),
        output_bytes(opened.checkpoint),
        per_node=resolve_workers("auto", opened.device, request.recipe.threads, useful),
    )
    return replace(plan, arrangement=arrangement, workers=replace(plan.workers, count=workers))


def _job(request: Request) -> Job:
    options = request.method.options(**request.options)
    return Job(request.recipe, request.method, options, request.pattern, request.samples)


def block_traffic(request: Request, index: int, workers: int) -> Traffic:
    """Return what the workers move to each other in block ``index``."""
    job, traffic = _job(request), NOTHING
    for linears in groups_of(request.linears[index]).values():
        matrices = [Matrix(*linear.shape, linear.item_bytes) for linear in linears]
        partition_rows = request.recipe.partition_rows or 0
        traffic += group_traffic(
            matrices, job.method, job.pattern, job.options, job.partitions, partition_rows, workers
        )
    return traffic


def _tiers(resources: Resources) -> dict[str, str]:
    return {name: getattr(resources, name) for name in ("activations", "intermediates", "statistics")}


def _cadence(
    request: Request,
    resources: Resources,
    rates: Rates,
    arrangement: Arrangement,
    hidden_bytes: int,
    disk: int | None,
) -> int:
    """Return after how many blocks inputs are kept; 0 (never) also where the disk has no room for them."""
    size, blocks = request.samples * hidden_bytes, len(request.model.layout.blocks)
    if not size or resources.keep_inputs == "never":
        return 0
    if disk is not None and output_bytes(request.model.checkpoint) + arrangement.peak.disk + 2 * size > disk:
        return 0
    if resources.keep_inputs != "auto":
        return resources.keep_inputs
    work, workers = work_of(request), arrangement.workers
    seconds = work.seconds(rates, workers) + arrangement.extra_seconds
    forward = work.forward / (1 + (request.recipe.fit == "dense-block")) / rates.flops / workers
    return keep_every(blocks, seconds / blocks, size / rates.disk_bytes, forward / blocks)


def _elsewhere(job: Job, work: list[BlockWork], size: int, own: int) -> dict[str, Arrangement | None]:
    """Return how one worker would go about it on machines of other kinds, each with as much RAM as it takes."""
    on_gpu = job.recipe.model_copy(
        update={
            "device": "cuda",
            "partition_rows": 2048,
            "dtype": "bfloat16" if job.recipe.dtype == "auto" else job.recipe.dtype,
        }
    )
    tiers = dict.fromkeys(("activations", "intermediates", "statistics"), "auto")
    plenty = 1 << 60
    found: dict[str, Arrangement | None] = {}
    for name, gpu_bytes in (("80 GB GPU", 80_000_000_000), ("24 GB GPU", 24_000_000_000), ("CPU", None)):
        one = job if gpu_bytes is None else replace(job, recipe=on_gpu)
        if gpu_bytes is None:
            one = replace(job, recipe=job.recipe.model_copy(update={"device": "cpu", "partition_rows": 256}))
        vram = None if gpu_bytes is None else int(VRAM_SHARE * gpu_bytes)
        rates = CPU_CORE if gpu_bytes is None else GPU
        try:
            found[name] = arrange(one, work, Budgets(vram, plenty, None), rates, [1], own, tiers, size)
        except InputError:
            found[name] = None
    return found


def block_work(model: Model, chosen: tuple[tuple[Linear, ...], ...], seqlen: int) -> list[BlockWork]:
    """Return each block with the linears to prune and what a sample needs in it."""
    sizes = [sum(tensor.entry.size_bytes for tensor in block.tensors) for block in model.layout.blocks]
    return [
        BlockWork(block, linears, footprint, size)
        for block, linears, footprint, size in zip(
            model.layout.blocks, chosen, model.skeleton.footprints(seqlen), [*sizes[1:], sizes[-1]], strict=True
        )
    ]


def output_bytes(checkpoint: Checkpoint) -> int:
    """Return the size of the output: that of the source, and of what travels along."""
    return checkpoint.size_bytes + sum((checkpoint.folder / name).stat().st_size for name in checkpoint.others)


@dataclass(frozen=True)
class Work:
    """What a run computes, in FLOP."""

    forward: float
    """In the compute dtype."""
    solving: float
    """In float32."""

    def seconds(self, rates: Rates, workers: int) -> float:
        """Return how long that takes ``workers`` workers."""
        return (self.forward / rates.flops + self.solving / rates.float32_flops) / workers


def work_of(request: Request) -> Work:
    """Return what meeting a request computes."""
    recipe, method = request.recipe, request.method
    own = method.options(**request.options)
    tokens = request.samples * (recipe.seqlen or 0)
    forward, solving = 0.0, 0.0
    for block, linears in zip(request.model.layout.blocks, request.linears, strict=True):
        forward += (1 + (recipe.fit == "dense-block")) * sum(
            2.0 * tokens * linear.shape[0] * linear.shape[1] for linear in block.linears
        )
        for linear in linears:
            solving += method.flops(*linear.shape, own)
        for columns in {linear.group: linear.shape[1] for linear in linears}.values():
            solving += method.factor_flops(columns)
            if method.statistic is not None:
                solving += tokens * columns**method.statistic.dimensions
    return Work(forward, solving)


def estimate(plan: Plan) -> Estimate:
    """Predict what a run takes from the shapes of its tensors, and its time from the rates of this machine."""
    request, workers = plan.request, plan.workers.count
    checkpoint, blocks = request.model.checkpoint, request.model.layout.blocks
    work = work_of(request)
    written = output_bytes(checkpoint)
    kept = request.samples * plan.hidden_bytes * sum(plan.keeps_inputs_of(block.index) for block in blocks)
    read = checkpoint.size_bytes + (workers - 1) * sum(
        tensor.entry.size_bytes for block in blocks for tensor in block.tensors
    )
    moving = (read + written + kept) / plan.rates.disk_bytes
    peak = plan.arrangement.peak
    on_gpu = request.recipe.device != "cpu"
    return Estimate(
        work.forward + work.solving,
        read,
        written + kept,
        sum(block_traffic(request, block.index, workers).moved_bytes for block in blocks),
        peak.disk,
        max(work.seconds(plan.rates, workers), moving) + plan.arrangement.extra_seconds,
        {"vram": peak.device if on_gpu else 0, "ram": peak.ram, "disk": written + plan.kept_bytes + peak.disk},
        plan.misfit is None,
    )


def plan(model: str | Path, *, recipe: str | Path | None = None, **options: Unpack[RunOptions]) -> Plan:
    """Return what ``prune`` would do with the same arguments: matches, memory, bytes, time. Touches no weights.

    Raises:
        InputError: for anything wrong with the model or the request.
    """
    asked, resources = read_options(recipe, options)
    return make_plan(make_request(model, asked, weights_needed=False), resources)
