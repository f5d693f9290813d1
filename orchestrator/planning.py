"""The plan: how a request is met on this machine, and what that takes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Unpack

from billhook.cluster.memory import own_bytes
from billhook.layerworkers.errors import BudgetError, InputError
from billhook.layerworkers.shards import TensorEntry
from billhook.layerworkers.tasks import BlockTask, Coverage, LinearTask, Tuning
from billhook.orchestrator.budgets import VRAM_SHARE, Budgets, resolve_budgets
from billhook.orchestrator.collected import written_to
from billhook.orchestrator.devices import (
    BANDWIDTH_BYTES,
    DEVICES,
    NOTHING_SUPPOSED,
    Device,
    Supposition,
    on_device,
    supposition,
)
from billhook.orchestrator.gradients import gradient_files, gradient_samples, gradients_of
from billhook.orchestrator.job import BlockWork, GradientWork, Job
from billhook.orchestrator.keeping import keep_every, kept_copies
from billhook.orchestrator.layout import Linear
from billhook.orchestrator.logits_needs import logits_gradient_bytes
from billhook.orchestrator.model import Model, check_gpus, resolve_workers
from billhook.orchestrator.phases import DASHBOARD_BYTES
from billhook.orchestrator.placing import Arrangement, DoesNotFitError, arrange
from billhook.orchestrator.probe import Rates, measured_rates
from billhook.orchestrator.recipe import Resources, RunOptions, read_options
from billhook.orchestrator.request import Request, make_request
from billhook.orchestrator.timing import BlockTime, Connection, block_time, passes
from billhook.orchestrator.workers import Workers

PLENTY_BYTES = 1 << 60
"""A budget that limits nothing."""

RECORD_BYTES = 2 << 10
"""Of journal, log, manifest, card and report, for one linear: more than they take."""

REPORT_BYTES = 6 << 20
"""Of the report beside that: mostly the library that draws its plots."""

RECORDS = 64
"""So many linears' records stand for what is written once for a run."""


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
    """From the rates of the device, which are measured in a moment where it is at hand."""
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
    supposed: Supposition
    rates: Rates
    own_bytes: int
    """Memory of a process that has imported the libraries."""
    arrangement: Arrangement
    """Where everything is kept."""
    connection: Connection
    times: tuple[BlockTime, ...]
    """By block; without what it takes longer where memory is short."""
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
        return BlockTask(
            index,
            blocks[index].tensors,
            blocks[index].others,
            tuple(
                LinearTask(
                    linear.disk_name,
                    linear.name,
                    request.pattern_of(linear),
                    request.solver_of(linear).method.name,
                    request.solver_of(linear).options,
                    0.0 if blocks[index].groups[linear.group].experts else recipe.correction or 0.0,
                )
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
            _job(request, self.resources, self.supposed).pace,
            Coverage(recipe.expert_tokens, recipe.expert_fallback),
            self._statistics_of(index, output),
            Tuning(recipe.reconstruct, recipe.reconstruct_rate),
            gradients_of(request, index, output),
        )

    def _statistics_of(self, index: int, output: Path) -> Mapping[str, TensorEntry]:
        """Return where the statistics of a block are written to, or were collected, if either."""
        request = self.request
        if request.collects is not None:
            return written_to(request.collects, index, output)
        return request.collected.entries[index] if request.collected is not None else {}

    def keeps_inputs_of(self, index: int) -> bool:
        """Whether the inputs of block ``index`` are kept."""
        return (
            self.keep_every > 0 and 0 < index < len(self.request.model.layout.blocks) and index % self.keep_every == 0
        )

    @property
    def kept_bytes(self) -> int:
        """Most bytes of kept inputs that lie on the disk at once."""
        return kept_copies(self.keep_every) * self.kept_rows * self.hidden_bytes

    @property
    def kept_rows(self) -> int:
        """Hidden states that a block's kept inputs are."""
        return self.request.samples * self.request.streams


def make_plan(
    request: Request, resources: Resources, output: Path | None = None, supposed: Supposition = NOTHING_SUPPOSED
) -> Plan:
    """Decide how a request is met.

    output: where the checkpoint will be written; its disk limits the run where no other limit is given. None: nothing
    will be. supposed: of a plan for other machines.

    Raises:
        InputError: where no way of working fits the budgets, or the machine lacks what was asked for.
    """
    recipe, opened = request.recipe, request.model
    job = _job(request, resources, supposed)
    useful = request.useful_workers
    here = resolve_workers("auto", opened.device, recipe.threads, useful)
    most = here if resources.workers == "auto" else resources.workers
    wanted = useful if resources.workers == "auto" and resources.address is not None else most
    own = own_bytes(os.getpid())  # before CUDA and the probe leave their traces, which a worker starts without
    per_node = None if resources.address is None else here
    if supposed.device is not None:
        device = DEVICES[supposed.device]
        budgets, rates, per_node = _budgets_of(device, resources), device.rates, 1
    else:
        if supposed.bandwidth_bytes is None:
            check_gpus(most, opened.device, resources.address)
        else:
            per_node = 1
        budgets = resolve_budgets(
            resources.vram, resources.ram, resources.disk, opened.device, output, resources.scratch
        )
        rates = measured_rates(opened)
    work = block_work(opened, request.linears, recipe.seqlen or 0)
    counts = range(most, 0, -1) if resources.workers == "auto" else [most]
    size = output_bytes(request)
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
    room = resources.address is not None and arrangement.workers == most
    connection = _connection(supposed, rates)
    times = _times(job, work, arrangement.workers, rates, connection)
    return Plan(
        request,
        resources,
        Workers(
            arrangement.workers,
            recipe.threads,
            resources.address,
            wanted if room else arrangement.workers,
            resources.dashboard,
        ),
        budgets,
        supposed,
        rates,
        own,
        arrangement,
        connection,
        times,
        _cadence(request, resources, rates, arrangement, times, hidden, within),
        hidden,
        _elsewhere(job, work, size, own) if output is None and supposed.device is None else {},
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
    opened, work = request.model, block_work(request.model, request.linears, request.recipe.seqlen or 0)
    job = _job(request, resources, plan.supposed)
    useful = request.useful_workers
    here = resolve_workers("auto", opened.device, request.recipe.threads, useful)
    arrangement = arrange(
        job,
        work,
        plan.budgets,
        plan.rates,
        [workers],
        plan.own_bytes,
        _tiers(resources),
        output_bytes(request),
        per_node=None if resources.address is None else here,
    )
    return replace(
        plan,
        arrangement=arrangement,
        workers=replace(plan.workers, count=workers),
        times=_times(job, work, workers, plan.rates, plan.connection),
    )


def _times(
    job: Job, work: Sequence[BlockWork], workers: int, rates: Rates, connection: Connection
) -> tuple[BlockTime, ...]:
    return tuple(block_time(job, facts, workers, rates, connection) for facts in work)


def _budgets_of(device: Device, resources: Resources) -> Budgets:
    """Return the budgets on a device that is supposed, with as much RAM and disk as it takes."""
    vram = None if device.memory_bytes is None else int(VRAM_SHARE * device.memory_bytes)
    return Budgets(
        vram if resources.vram is None else resources.vram,
        PLENTY_BYTES if resources.ram is None else resources.ram,
        resources.disk,
    )


def _connection(supposed: Supposition, rates: Rates) -> Connection:
    if supposed == NOTHING_SUPPOSED:
        return Connection(rates.copy_bytes, apart=False)
    return Connection(supposed.bandwidth_bytes or BANDWIDTH_BYTES, apart=True)


def _job(request: Request, resources: Resources, supposed: Supposition) -> Job:
    options = request.method.options(**request.options)
    near = resources.address is None and supposed == NOTHING_SUPPOSED
    return Job(
        *(request.recipe, request.method, options, request.pattern, request.samples, near, supposed.bandwidth_bytes),
        beside_bytes=DASHBOARD_BYTES if resources.dashboard else 0,
        others=request.others,
        gradients=_gradient_work(request),
    )


def _gradient_work(request: Request) -> GradientWork | None:
    if not (samples := gradient_samples(request)):
        return None
    model = request.model
    head = logits_gradient_bytes(model, request.recipe.seqlen or 0)
    return GradientWork(samples, len(model.layout.blocks), head)


def _tiers(resources: Resources) -> dict[str, str]:
    return {name: getattr(resources, name) for name in ("activations", "intermediates", "statistics")}


def _cadence(
    request: Request,
    resources: Resources,
    rates: Rates,
    arrangement: Arrangement,
    times: Sequence[BlockTime],
    hidden_bytes: int,
    budgets: Budgets,
) -> int:
    """Return after how many blocks inputs are kept; 0 (never) also where the disk has no room for them.

    Raises:
        InputError: when they were asked for, and there is no room.
    """
    size, blocks = request.samples * request.streams * hidden_bytes, len(request.model.layout.blocks)
    if not size or resources.keep_inputs == "never":
        return 0
    if resources.keep_inputs == "auto":
        seconds = sum(time.seconds for time in times) + arrangement.extra_seconds
        job = _job(request, resources, NOTHING_SUPPOSED)
        forward = sum(time.forward for time in times) / passes(job)
        every = keep_every(blocks, seconds / blocks, size / rates.disk_bytes, forward / blocks)
    else:
        every = resources.keep_inputs
    for choice in [every, 2] if (every, resources.keep_inputs) == (1, "auto") else [every]:
        kept = kept_copies(choice) * size
        written = output_bytes(request) + kept
        apart = budgets.disk is None or written + arrangement.peak.disk <= budgets.disk
        if apart and (budgets.output_disk is None or written <= budgets.output_disk):
            return choice
    if resources.keep_inputs == "auto":
        return 0
    raise BudgetError(
        f"--keep-inputs {every}: the disk has no room for another {kept_copies(every) * size} bytes; free some space, "
        "or say --keep-inputs never"
    )


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
    found: dict[str, Arrangement | None] = {}
    for name, gpu_bytes in (("80 GB GPU", 80_000_000_000), ("24 GB GPU", 24_000_000_000), ("CPU", None)):
        one = job if gpu_bytes is None else replace(job, recipe=on_gpu)
        if gpu_bytes is None:
            one = replace(job, recipe=job.recipe.model_copy(update={"device": "cpu", "partition_rows": 256}))
        vram = None if gpu_bytes is None else int(VRAM_SHARE * gpu_bytes)
        rates = DEVICES["cpu-core" if gpu_bytes is None else "a100"].rates
        try:
            found[name] = arrange(one, work, Budgets(vram, PLENTY_BYTES, None), rates, [1], own, tiers, size)
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


def output_bytes(request: Request) -> int:
    """Return the size of the output: of its shards, what travels along, gradients, and the records at most."""
    checkpoint, linears = request.written, sum(len(block.linears) for block in request.model.layout.blocks)
    others = sum((checkpoint.folder / name).stat().st_size for name in checkpoint.others)
    gradients = gradient_files(request).size_bytes if gradient_samples(request) else 0
    return checkpoint.size_bytes + others + gradients + REPORT_BYTES + RECORD_BYTES * (linears + RECORDS)


def kinds_of_blocks(plan: Plan) -> dict[BlockTime, list[int]]:
    """Return the blocks that take the same, by what they take."""
    kinds: dict[BlockTime, list[int]] = {}
    for index, time in enumerate(plan.times):
        kinds.setdefault(time, []).append(index)
    return kinds


def estimate(plan: Plan) -> Estimate:
    """Predict what a run takes from the shapes of its tensors, and its time from the rates of this machine."""
    request, workers = plan.request, plan.workers.count
    checkpoint, blocks = request.model.checkpoint, request.model.layout.blocks
    written = output_bytes(request)
    kept = plan.kept_rows * plan.hidden_bytes * sum(plan.keeps_inputs_of(block.index) for block in blocks)
    in_blocks = sum(tensor.entry.size_bytes for block in blocks for tensor in block.tensors)
    read = checkpoint.size_bytes + (workers - 1) * in_blocks
    if gradient_samples(request):
        read += workers * (2 * in_blocks + gradient_files(request).size_bytes)
    rest = 2 * sum(entry.size_bytes for entry in request.copied) / plan.rates.disk_bytes
    peak = plan.arrangement.peak
    on_gpu = request.recipe.device != "cpu"
    return Estimate(
        sum(time.flops for time in plan.times),
        read,
        written + kept,
        sum(time.moved_bytes for time in plan.times),
        peak.disk,
        sum(time.seconds for time in plan.times) + rest + plan.arrangement.extra_seconds,
        {"vram": peak.device if on_gpu else 0, "ram": peak.ram, "disk": written + plan.kept_bytes + peak.disk},
        plan.misfit is None,
    )


def plan(
    model: str | Path,
    *,
    recipe: str | Path | None = None,
    assume_device: str | None = None,
    bandwidth: float | str | None = None,
    **options: Unpack[RunOptions],
) -> Plan:
    """Return what ``prune`` would do with the same arguments: matches, memory, bytes, time. Touches no weights.

    assume_device: plan for workers with one of these devices each (``h100``, ...), each on a node of its own, instead
    of this machine. bandwidth: what goes into or out of a worker, each on a node of its own, in bytes per second, or
    as ``12GB/s``.

    Raises:
        InputError: for anything wrong with the model or the request.
    """
    asked, resources = read_options(recipe, options)
    supposed = supposition(assume_device, bandwidth)
    request = make_request(model, on_device(asked, supposed), weights_needed=False, device_needed=assume_device is None)
    return make_plan(request, resources, supposed=supposed)
