"""The plan of a run: what matches, what it takes, and everything that the bytes of the output depend on."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Unpack

from billhook.cluster.memory import own_bytes
from billhook.layerworkers.errors import InputError
from billhook.layerworkers.machine import machine_facts
from billhook.layerworkers.methods import METHODS, Method
from billhook.layerworkers.patterns import NM, Pattern, parse_pattern
from billhook.layerworkers.tasks import BlockTask, LinearTask
from billhook.orchestrator.budgets import VRAM_SHARE, Budgets, resolve_budgets
from billhook.orchestrator.calibration import default_seqlen
from billhook.orchestrator.checkpoint import Checkpoint
from billhook.orchestrator.layout import Layout, Linear
from billhook.orchestrator.model import Model, check_gpus, open_model, resolve_workers
from billhook.orchestrator.phases import BlockWork, Job
from billhook.orchestrator.placing import Arrangement, DoesNotFitError, arrange
from billhook.orchestrator.probe import CPU_CORE, GPU, Rates, measured_rates
from billhook.orchestrator.recipe import Recipe, Resources, RunOptions, method_options, read_options
from billhook.orchestrator.workers import Workers


@dataclass(frozen=True)
class Estimate:
    """What a run takes, predicted from shapes."""

    flops: float
    bytes_read: int
    bytes_written: int
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
    """A run, decided: nothing is left to choose but time and place."""

    model: Model
    recipe: Recipe
    """With every default filled in."""
    pattern: Pattern
    options: dict[str, Any]
    """All options of the method."""
    workers: Workers
    linears: tuple[tuple[Linear, ...], ...]
    """The linears to prune, by block."""
    skipped: tuple[Linear, ...]
    """Linears in blocks that include and exclude leave dense."""
    other_matrices: tuple[str, ...]
    """Matrices in blocks that are the weight of no linear: left dense."""
    unknown: tuple[str, ...]
    """Tensors on disk inside a block that are no parameter of it: copied."""
    budgets: Budgets
    rates: Rates
    arrangement: Arrangement
    """Where everything is kept; no byte of the output depends on it."""
    scratch: str | None
    """Folder for what is kept on disk; None: in the output."""
    elsewhere: dict[str, Arrangement | None]
    """How one worker would do it on other kinds of machines; None where it cannot."""
    misfit: str | None
    """Why the budgets are too small and what would do; the arrangement is then made for what would do."""

    @property
    def method(self) -> Method:
        """The pruning method."""
        return METHODS[self.recipe.method]

    @property
    def partitions(self) -> int:
        """Partitions of the calibration samples."""
        if self.method.statistic is None:
            return 0
        return -(-self.recipe.samples // self.recipe.partition_samples)

    def task(self, index: int, output: Path) -> BlockTask:
        """Return what a worker is told about block ``index``."""
        block = self.model.layout.blocks[index]
        return BlockTask(
            index,
            block.tensors,
            block.others,
            tuple(
                LinearTask(
                    linear.disk_name, linear.name, self.pattern, self.recipe.method, self.method.options(**self.options)
                )
                for linear in self.linears[index]
            ),
            self.recipe.fit,
            str(output),
            self.recipe.partition_samples,
            self.partitions,
            self.recipe.partition_rows or 0,
            self.arrangement.placements[index],
            tuple(tensor for later in self.model.layout.blocks[index + 1 : index + 2] for tensor in later.tensors),
        )

    def fingerprint(self, calibration_sha256: str | None) -> dict[str, Any]:
        """Return everything that the bytes of the output depend on, as plain JSON values."""
        recipe = self.recipe.model_dump(mode="json")
        recipe["options"] = self.options
        recipe["calibration"] = calibration_sha256
        if self.method.statistic is None:
            for key in ("field", "samples", "seqlen", "seed", "bos", "fit", "partition_samples"):
                del recipe[key]
        return {
            "recipe": recipe,
            "checkpoint": self.model.checkpoint.sha256(),
            "versions": versions(),
            "machine": machine_facts(self.model.device),
        }


def make_plan(model: str | Path, recipe: Recipe, resources: Resources, output: Path | None = None) -> Plan:
    """Decide a run from the config and the shards' headers: no weight is read.

    output: where the checkpoint will be written; its disk limits the run where no other limit is given. None: nothing
    will be, and a folder that holds a config only will do.

    Raises:
        InputError: for anything wrong with the model or the request, or where no way of working fits the budgets.
    """
    options = method_options(recipe.method, recipe.options)
    pattern = parse_pattern(recipe.pattern, recipe.sparsity)
    opened = open_model(model, recipe.device, recipe.dtype, recipe.trust_remote_code, output is not None)
    seqlen = recipe.seqlen or default_seqlen(opened.config)
    check_context(seqlen, opened.config)
    recipe = recipe.model_copy(
        update={
            "sparsity": float(pattern.sparsity),
            "options": options,
            "fit": METHODS[recipe.method].fit if recipe.fit == "auto" else recipe.fit,
            "device": opened.device,
            "dtype": opened.dtype,
            "seqlen": seqlen,
            "partition_rows": recipe.partition_rows or (256 if opened.device == "cpu" else 2048),
        }
    )
    chosen, skipped = _choose(opened.layout, recipe, opened.checkpoint.folder)
    _check_widths(chosen, pattern)
    method = METHODS[recipe.method]
    job = Job(recipe, method, method.options(**options), pattern, recipe.samples if method.statistic is not None else 0)
    useful = job.partitions if job.samples else 1
    most = resolve_workers(resources.workers, opened.device, recipe.threads, useful)
    check_gpus(most, opened.device, resources.address)
    own = own_bytes(os.getpid())  # before CUDA and the probe leave their traces, which a worker starts without
    budgets = resolve_budgets(resources.vram, resources.ram, resources.disk, opened.device, output, resources.scratch)
    rates = measured_rates(opened)
    work = block_work(opened, chosen, seqlen)
    counts = range(most, 0, -1) if resources.workers == "auto" else [most]
    tiers = {name: getattr(resources, name) for name in ("activations", "intermediates", "statistics")}
    size = output_bytes(opened.checkpoint)
    misfit, within = None, budgets
    while True:
        try:
            arrangement = arrange(job, work, within, rates, counts, own, tiers, size)
            break
        except DoesNotFitError as error:
            if output is not None:
                raise
            misfit, within = misfit or str(error), error.smallest
    return Plan(
        opened,
        recipe,
        pattern,
        options,
        Workers(arrangement.workers, recipe.threads, resources.address),
        chosen,
        skipped,
        tuple(name for block in opened.layout.blocks for name in block.other_matrices),
        tuple(entry.name for block in opened.layout.blocks for entry in block.others),
        budgets,
        rates,
        arrangement,
        resources.scratch,
        _elsewhere(job, work, size, own) if output is None else {},
        misfit,
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


def versions() -> dict[str, str]:
    """Return the versions of the libraries that decide bits."""
    from importlib.metadata import version

    names = ("billhook", "torch", "transformers", "safetensors", "numpy", "scipy", "numba", "tokenizers")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def check_context(seqlen: int, config: Any) -> None:
    """Check that windows of ``seqlen`` tokens fit the model.

    Raises:
        InputError: when they do not.
    """
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if context is not None and seqlen > context:
        raise InputError(f"--seqlen {seqlen}: the model's context is {context} tokens; use at most that")


def _choose(layout: Layout, recipe: Recipe, folder: Path) -> tuple[tuple[tuple[Linear, ...], ...], tuple[Linear, ...]]:
    include, exclude = _compile("--include", recipe.include), _compile("--exclude", recipe.exclude)
    everything = [linear for block in layout.blocks for linear in block.linears]
    if not everything:
        raise InputError(f"{folder}: the blocks have no linear layers that billhook knows how to prune")
    for option, patterns in (("--include", include), ("--exclude", exclude)):
        for pattern in patterns:
            if not any(pattern.search(linear.disk_name) for linear in everything):
                raise InputError(
                    f"{option} {pattern.pattern}: matches none of the {len(everything)} linears, whose names are like "
                    f"{everything[0].disk_name}"
                )

    def wanted(linear: Linear) -> bool:
        name = linear.disk_name
        included = not include or any(pattern.search(name) for pattern in include)
        return included and not any(pattern.search(name) for pattern in exclude)

    chosen = tuple(tuple(linear for linear in block.linears if wanted(linear)) for block in layout.blocks)
    if not any(chosen):
        raise InputError("--include and --exclude together leave nothing to prune")
    return chosen, tuple(linear for linear in everything if not wanted(linear))


def _compile(option: str, patterns: tuple[str, ...]) -> list[re.Pattern[str]]:
    compiled = []
    for pattern in patterns:
        try:
            compiled.append(re.compile(pattern))
        except re.error as error:
            raise InputError(f"{option} {pattern}: is not a regular expression: {error}") from error
    return compiled


def _check_widths(chosen: tuple[tuple[Linear, ...], ...], pattern: Pattern) -> None:
    if isinstance(pattern, NM):
        for linear in (linear for block in chosen for linear in block):
            if linear.shape[1] % pattern.group:
                raise InputError(
                    f"--pattern {pattern}: {linear.disk_name} is {linear.shape[1]} wide, which {pattern.group} does "
                    "not divide; --exclude it or choose another pattern"
                )


def estimate(plan: Plan) -> Estimate:
    """Predict what a run takes from the shapes of its tensors, and its time from the rates of this machine."""
    checkpoint, layout, method = plan.model.checkpoint, plan.model.layout, plan.method
    recipe, workers = plan.recipe, plan.workers.count
    own = method.options(**plan.options)
    tokens = recipe.samples * (recipe.seqlen or 0) if method.statistic is not None else 0
    forward, solving = 0.0, 0.0
    for block, linears in zip(layout.blocks, plan.linears, strict=True):
        forward += (1 + (recipe.fit == "dense-block")) * sum(
            2.0 * tokens * linear.shape[0] * linear.shape[1] for linear in block.linears
        )
        for linear in linears:
            solving += method.flops(*linear.shape, own)
        for columns in {linear.group: linear.shape[1] for linear in linears}.values():
            solving += method.factor_flops(columns)
            if method.statistic is not None:
                solving += tokens * columns**method.statistic.dimensions
    written = output_bytes(checkpoint)
    read = checkpoint.size_bytes + (workers - 1) * sum(
        tensor.entry.size_bytes for block in layout.blocks for tensor in block.tensors
    )
    computing = (forward / plan.rates.flops + solving / plan.rates.float32_flops) / workers
    moving = (read + written) / plan.rates.disk_bytes
    peak = plan.arrangement.peak
    return Estimate(
        forward + solving,
        read,
        written,
        peak.disk,
        max(computing, moving) + plan.arrangement.extra_seconds,
        {"vram": peak.device if recipe.device != "cpu" else 0, "ram": peak.ram, "disk": written + peak.disk},
        plan.misfit is None,
    )


def plan(model: str | Path, *, recipe: str | Path | None = None, **options: Unpack[RunOptions]) -> Plan:
    """Return what ``prune`` would do with the same arguments: matches, memory, bytes, time. Touches no weights.

    Raises:
        InputError: for anything wrong with the model or the request.
    """
    return make_plan(model, *read_options(recipe, options))
