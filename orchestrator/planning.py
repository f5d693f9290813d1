"""The plan of a run: what matches, what it takes, and everything that the bytes of the output depend on."""

from __future__ import annotations

import os
import platform
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import torch

from billhook.kernels.products import row_partitions
from billhook.layerworkers.errors import InputError
from billhook.layerworkers.machine import machine_facts
from billhook.layerworkers.methods import METHODS, Method
from billhook.layerworkers.patterns import NM, Pattern, parse_pattern
from billhook.layerworkers.shards import DTYPES
from billhook.layerworkers.tasks import BlockTask, LinearTask
from billhook.orchestrator.calibration import default_seqlen
from billhook.orchestrator.layout import Block, Layout, Linear
from billhook.orchestrator.model import Model, check_gpus, open_model, resolve_workers
from billhook.orchestrator.recipe import Recipe, Resources, RunOptions, method_options, read_options
from billhook.orchestrator.workers import Workers

PROCESS_BYTES = 420 << 20
"""Memory of a Python process with torch and transformers imported, before any data."""

RAY_BYTES = 450 << 20
"""Memory of Ray's own processes on one node."""


@dataclass(frozen=True)
class Estimate:
    """What a run takes, predicted from shapes."""

    flops: float
    bytes_read: int
    bytes_written: int
    seconds: float
    """From the rate of a short matrix product on this machine."""
    peak_bytes: dict[str, int]
    """vram and ram of this node, disk of the output."""
    fits: bool
    """Whether the peaks are within what this machine has in all."""


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


def make_plan(model: str | Path, recipe: Recipe, resources: Resources) -> Plan:
    """Decide a run from the config and the shards' headers: no weight is read.

    Raises:
        InputError: for anything wrong with the model or the request.
    """
    options = method_options(recipe.method, recipe.options)
    pattern = parse_pattern(recipe.pattern, recipe.sparsity)
    opened = open_model(model, recipe.device, recipe.dtype, recipe.trust_remote_code)
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
    useful = -(-recipe.samples // recipe.partition_samples) if METHODS[recipe.method].statistic is not None else 1
    count = resolve_workers(resources.workers, opened.device, recipe.threads, useful)
    check_gpus(count, opened.device, resources.address)
    return Plan(
        opened,
        recipe,
        pattern,
        options,
        Workers(count, recipe.threads, resources.address),
        chosen,
        skipped,
        tuple(name for block in opened.layout.blocks for name in block.other_matrices),
        tuple(entry.name for block in opened.layout.blocks for entry in block.others),
    )


def object_store_bytes(plan: Plan) -> int:
    """Return what Ray's object store must hold: an exchange's statistics from all workers, and the solved rows."""
    if plan.workers.count == 1:
        return 0
    linears = [linear for block in plan.linears for linear in block]
    statistic = plan.method.statistic
    widest = max(linear.shape[1] for linear in linears)
    largest = max(linear.shape[0] * linear.shape[1] for linear in linears)
    reduced = statistic.size_bytes(widest) if statistic is not None else 0
    return plan.workers.count * 4 * reduced + 2 * 4 * largest + (128 << 20)


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
    """Predict what a run takes from the shapes of its tensors, and its time from a short measurement here."""
    checkpoint, layout, method = plan.model.checkpoint, plan.model.layout, plan.method
    recipe, workers = plan.recipe, plan.workers.count
    own = method.options(**plan.options)
    samples = recipe.samples if method.statistic is not None else 0
    tokens = samples * (recipe.seqlen or 0)
    flops, ram, vram = 0.0, 0, 0
    for block, linears in zip(layout.blocks, plan.linears, strict=True):
        flops += (1 + (recipe.fit == "dense-block")) * sum(
            2.0 * tokens * linear.shape[0] * linear.shape[1] for linear in block.linears
        )
        for linear in linears:
            flops += method.flops(*linear.shape, own)
        for columns in {linear.group: linear.shape[1] for linear in linears}.values():
            flops += method.factor_flops(columns)
            if method.statistic is not None:
                flops += tokens * columns**method.statistic.dimensions
        ram = max(ram, _block_bytes(block, linears, recipe, method, workers, samples))
    if recipe.device == "cuda":
        vram, ram = ram // workers, sum(tensor.entry.size_bytes for tensor in layout.blocks[0].tensors) * workers
    embedding = layout.stem.embedding
    rows_read = min(tokens, embedding.shape[0]) * (embedding.size_bytes // embedding.shape[0])
    ram += (PROCESS_BYTES * (workers + 1)) + RAY_BYTES + rows_read + object_store_bytes(plan)
    written = checkpoint.size_bytes + sum((checkpoint.folder / name).stat().st_size for name in checkpoint.others)
    read = checkpoint.size_bytes + (workers - 1) * sum(
        tensor.entry.size_bytes for block in layout.blocks for tensor in block.tensors
    )
    peak = {"vram": vram, "ram": ram, "disk": written}
    return Estimate(
        flops, read, written, flops / (_measured_flops_per_second(recipe.device) * workers), peak, _fits(peak)
    )


def _block_bytes(
    block: Block, linears: tuple[Linear, ...], recipe: Recipe, method: Method, workers: int, samples: int
) -> int:
    """Estimate what all workers hold at the worst moment of one block."""
    weights = sum(tensor.entry.size_bytes for tensor in block.tensors)
    item = DTYPES["F32"].itemsize if recipe.dtype == "float32" else 2
    width = max((linear.shape[1] for linear in block.linears), default=0)
    hidden = min((linear.shape[1] for linear in block.linears), default=0)
    activations = samples * (recipe.seqlen or 0) * item * (2 * hidden + 2 * width)
    solve = 0
    for linear in linears:
        rows, columns = linear.shape
        partition = max(stop - start for start, stop in row_partitions(rows, recipe.partition_rows or 256))
        statistic = method.statistic.size_bytes(columns) if method.statistic is not None else 0
        live = (samples // recipe.partition_samples // workers).bit_length() + 2
        solve = max(
            solve,
            workers * live * statistic
            + 4 * rows * columns
            + method.extra_bytes(rows, columns)
            + 4 * partition * columns,
        )
    return workers * 2 * weights + activations + solve


def _fits(peak: dict[str, int]) -> bool:
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    vram = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0
    return peak["ram"] <= ram and peak["vram"] <= vram


def _measured_flops_per_second(device: str) -> float:
    """Time a float32 product of 1024 x 1024 matrices on one thread: the slower of the two rates that matter."""
    threads = torch.get_num_threads()
    a = torch.ones(1024, 1024, device=device)
    try:
        torch.set_num_threads(1)
        _ = a @ a
        begin = time.perf_counter()
        for _ in range(3):
            _ = float((a @ a)[0, 0])
        return 3 * 2.0 * 1024**3 / (time.perf_counter() - begin)
    finally:
        torch.set_num_threads(threads)


def plan(model: str | Path, *, recipe: str | Path | None = None, **options: Unpack[RunOptions]) -> Plan:
    """Return what ``prune`` would do with the same arguments: matches, memory, bytes, time. Touches no weights.

    Raises:
        InputError: for anything wrong with the model or the request.
    """
    return make_plan(model, *read_options(recipe, options))
