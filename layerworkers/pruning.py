"""Pruning of a block: what a worker does with one block in hand, and what collects its statistics instead."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from billhook.layerworkers.activations import Activations
from billhook.layerworkers.auxiliaries import Auxiliaries, alternate, alternated, network_of
from billhook.layerworkers.block_facts import InputGroup
from billhook.layerworkers.collected import write_collected
from billhook.layerworkers.fitting import BlockFit, Solve
from billhook.layerworkers.gradients import Samples
from billhook.layerworkers.held import Held
from billhook.layerworkers.lockstep import DenseStream, run_observed, run_plain
from billhook.layerworkers.methods import Alternation
from billhook.layerworkers.problem import RowsOf
from billhook.layerworkers.reconstruction import tune_if_better
from billhook.layerworkers.reduction import Node
from billhook.layerworkers.regional import output_gradient_squares, regional, tune_in_rounds
from billhook.layerworkers.reverse import WrittenRoots
from billhook.layerworkers.shards import DTYPES, TensorEntry
from billhook.layerworkers.solving import Together, left_dense, recounted, solve_stage, sum_over_workers
from billhook.layerworkers.statistics import Statistic
from billhook.layerworkers.tasks import BlockReport, BlockTask, LinearReport, LinearTask, Reconstruction


@torch.inference_mode()
def prune_block(held: Held, task: BlockTask) -> BlockReport:
    """Prune one block, begin to write this worker's share of its tensors, and carry the samples through it.

    Fitted in ``lockstep``, a linear sees inputs that passed the sparse linears before it, in one forward pass.
    Fitted to the ``dense-block``, it sees what the dense block gives it, and a second pass carries the samples on.
    The share of the block before is on the disk when this returns.

    Raises:
        InputError: when a weight is NaN or infinite: the tensor is named.
        RunError: when a solve or the disk fails.
    """
    began, begin = time.time(), time.monotonic()
    disk = _begin_block(held, task)
    entries = {tensor.entry.name: tensor for tensor in task.tensors}
    pruned = {linear.disk_name for linear in task.linears}
    own = {entry.name for entry in _own_share(held, task)}
    for entry in _own_share(held, task):
        if entry.name not in pruned:
            held.writer.write(task.output, entry, disk.get(entry.name))
    reports: dict[str, LinearReport] = {}
    beside = _begin_dense(held, task)
    again, how = alternated(task.linears, held.skeleton.facts(task.index).feed_forward)
    dense = {linear.disk_name: disk[linear.disk_name].clone() for linear in again}
    inputs = held.copied_inputs() if task.tuning.epochs or again else None
    changing = {linear.disk_name for linear in task.linears} if task.tuning.epochs else set(dense)
    gradient_squares = _tune_region(held, task, disk) | {
        name: WrittenRoots(entry, held.reader.bytes_of) for name, entry in task.gradients.items()
    }

    def solve(groups: Sequence[Together]) -> None:
        with held.watch.part("solving"):
            for report in solve_stage(groups, disk, task, held.group, held.device, held.watch, gradient_squares):
                reports[report.name] = _rounded(report, disk, entries[report.name].entry)
                held.skeleton.set_parameter(entries[report.name].module_name, disk[report.name])
                if report.name in own - changing:
                    held.writer.write(task.output, entries[report.name].entry, disk[report.name])

    fit = _fit_of(held, task, solve, beside)
    if task.collected:
        fit.run_without_samples()
    else:
        fit.run(held.hidden, held.arguments_of(task.index))
    reconstruction = None
    if inputs is not None and again:
        reports |= _alternate(held, task, again, how, dense, disk, inputs)
    if inputs is not None and task.tuning.epochs:
        removed_from = [name for name, report in reports.items() if report.removed]
        reconstruction = _reconstruct(held, task, disk, removed_from, inputs)
        reports = {name: recounted(report, disk[name]) for name, report in reports.items()}
    if inputs is not None:
        del inputs[:]  # those that are parked give their places back
    for linear in task.linears:
        name = linear.disk_name
        if name not in reports:
            reports[name] = left_dense(linear, disk[name])
            changing.add(name)
        if name in own & changing:
            held.writer.write(task.output, entries[name].entry, disk[name])
        reports[name] = fit.described(reports[name], linear.name, entries[name].entry.transposed)
    disk.clear()
    ordered = tuple(reports[linear.disk_name] for linear in task.linears)
    return replace(_end_block(held, task, ordered, began, begin), reconstruction=reconstruction)


@torch.inference_mode()
def collect_block(held: Held, task: BlockTask) -> BlockReport:
    """Write the statistics of the inputs of a block as it is, and carry the samples through it.

    They are summed over all workers, each input's on another one, which writes them. The share of the block before
    is on the disk when this returns.

    Raises:
        InputError, RunError: as :func:`prune_block`.
    """
    began, begin = time.time(), time.monotonic()
    disk = _begin_block(held, task)
    collectors = itertools.cycle(range(held.group.size))

    def collect(groups: Sequence[Together]) -> None:
        for together in groups:
            if together.statistic is None:  # of an expert that too few tokens are sent to
                continue
            columns = disk[together.linears[0].disk_name].shape[1]
            with held.watch.part("statistics"):
                shape = together.statistic.shape(columns)
                total = sum_over_workers(
                    shape, together.nodes, task.partitions, held.group, next(collectors), held.device
                )
            if total is not None and together.collected is not None:
                with held.watch.part("files"):
                    write_collected(total, together.collected, held.writer.write_rows)

    fit = _fit_of(held, task, collect)
    fit.run(held.hidden, held.arguments_of(task.index))
    entries = {tensor.entry.name: tensor.entry for tensor in task.tensors}
    reports = [
        fit.described(left_dense(linear, disk[linear.disk_name]), linear.name, entries[linear.disk_name].transposed)
        for linear in task.linears
    ]
    disk.clear()
    return _end_block(held, task, reports, began, begin)


def _begin_block(held: Held, task: BlockTask) -> dict[str, Tensor]:
    """Load a block, begin to read the next; return its tensors as on disk, by name."""
    held.moved_bytes = 0
    held.watch.read()
    if not task.placement.read_ahead:
        with held.watch.part("files"):
            held.writer.wait_written()  # there is no room for the last block beside this one
    disk = held.load(task.tensors)
    if task.placement.read_ahead:
        held.reader.begin(task.next_tensors, held.writer.written)
    return disk


def _own_share(held: Held, task: BlockTask) -> list[TensorEntry]:
    """Return what this worker writes of the block: every ``size``-th tensor."""
    return [*(tensor.entry for tensor in task.tensors), *task.others][held.group.rank :: held.group.size]


def _begin_dense(held: Held, task: BlockTask) -> DenseStream | None:
    """Return the dense stream where it runs beside; else carry it through the block, which is dense yet."""
    if not held.setup.dense_stream:
        return None
    block = held.skeleton.blocks[task.index]
    if task.fit == "lockstep" and any(linear.correction for linear in task.linears):
        return DenseStream(deepcopy(block), held.dense)
    run_plain(block, held.dense, held.arguments_of(task.index))
    return None


def _fit_of(held: Held, task: BlockTask, solve: Solve, beside: DenseStream | None = None) -> BlockFit:
    return BlockFit(
        held.skeleton.blocks[task.index],
        held.skeleton.facts(task.index).input_groups,
        task,
        held.indices,
        held.device,
        held.parking,
        held.group,
        held.watch,
        solve,
        beside,
    )


def _tune_region(held: Held, task: BlockTask, disk: dict[str, Tensor]) -> dict[str, RowsOf]:
    """Return the mean squared gradients of the weights whose methods ask for them, by name on disk.

    Where these tune the block first, the weights in ``disk`` are in float32 from now on.
    """
    linears, rounds = regional(task.linears)
    if not linears:
        return {}
    block, arguments = held.skeleton.blocks[task.index], held.arguments_of(task.index)
    indices = held.indices
    names = {linear.name: linear.disk_name for linear in linears}
    modules = {tensor.entry.name: tensor.module_name for tensor in task.tensors}
    targets = held.copied_inputs()
    run_plain(block, targets, arguments)
    samples = Samples(indices, held.hidden, targets, task.partition_samples, task.partitions)
    parking = held.parking(task.placement.statistics)
    found = output_gradient_squares(block, list(names), samples, arguments, parking, held.group, held.device)
    squares: dict[str, RowsOf] = {names[name]: partial(_rows_of, found[name]) for name in found}
    if rounds.count:
        disk.update({name: disk[name].float() for name in names.values()})

    def put(name: str, weight: Tensor) -> None:
        held.skeleton.set_parameter(modules[names[name]], weight)

    def solve(groups: Sequence[Together]) -> None:
        with held.watch.part("solving"):
            for report in solve_stage(groups, disk, task, held.group, held.device, held.watch, squares):
                held.skeleton.set_parameter(modules[report.name], disk[report.name])

    def prune() -> None:
        inputs = held.copied_inputs()
        _fit_of(held, replace(task, linears=tuple(linears)), solve).run(inputs, arguments)
        del inputs[:]  # those that are parked give their places back

    masters = {name: disk[disk_name] for name, disk_name in names.items()}
    tune_in_rounds(block, masters, samples, arguments, rounds, prune, put, held.group, held.device)
    del targets[:]
    return squares


def _alternate(
    held: Held,
    task: BlockTask,
    linears: Sequence[LinearTask],
    how: Alternation,
    dense: Mapping[str, Tensor],
    disk: dict[str, Tensor],
    inputs: Activations,
) -> dict[str, LinearReport]:
    """Prune the linears of the feed-forward network once more, together, in ``disk`` and in the block.

    Their reports are returned by name on disk. dense: their weights as they were. inputs: of the block, whose
    outputs are replaced.
    """
    block, arguments = held.skeleton.blocks[task.index], held.arguments_of(task.index)
    form = held.skeleton.facts(task.index).feed_forward
    assert form is not None
    by_name = {linear.name: linear for linear in linears}
    modules = {tensor.entry.name: tensor.module_name for tensor in task.tensors}
    reports: dict[str, LinearReport] = {}

    def refit(name: str, statistic: Statistic, nodes: list[Node]) -> None:
        linear = replace(by_name[name], correction=1.0)
        together = Together([linear], nodes, statistic, of_output=True, ridge=how.ridge)
        weights = {linear.disk_name: dense[linear.disk_name].clone()}
        with held.watch.part("solving"):
            for report in solve_stage([together], weights, task, held.group, held.device, held.watch):
                reports[report.name] = report
        disk[linear.disk_name] = weights[linear.disk_name]
        sparse[name] = weights[linear.disk_name]
        held.skeleton.set_parameter(modules[linear.disk_name], weights[linear.disk_name])

    auxiliaries = Auxiliaries(*(held.new_stream() for _ in range(4)))
    entering = InputGroup(form.up, (form.up,))
    run_observed(block, [entering], inputs, arguments, lambda _, __, x: auxiliaries.inputs.append(x))
    sparse = {name: disk[linear.disk_name] for name, linear in by_name.items()}
    alternate(
        network_of(block, form, {name: dense[linear.disk_name] for name, linear in by_name.items()}, sparse),
        auxiliaries,
        held.indices,
        task.partition_samples,
        how,
        refit,
        held.device,
        held.parking(task.placement.statistics),
    )
    auxiliaries.forget()
    for number, hidden in enumerate(inputs):
        held.hidden[number] = hidden.clone()
    run_plain(block, held.hidden, arguments)
    return reports


def _reconstruct(
    held: Held, task: BlockTask, disk: Mapping[str, Tensor], names: Sequence[str], inputs: Activations
) -> Reconstruction:
    """Tune what is kept of linears from which something was removed, if that helps, in ``disk`` and in the block.

    names: theirs on disk. inputs: of the block, of the sparse stream, whose outputs are replaced.
    """
    linears = {linear.name: linear.disk_name for linear in task.linears if linear.disk_name in names}
    modules = {tensor.entry.name: tensor.module_name for tensor in task.tensors}
    return tune_if_better(
        held.skeleton.blocks[task.index],
        {name: disk[disk_name] for name, disk_name in linears.items()},
        Samples(held.indices, inputs, held.dense, task.partition_samples, task.partitions),
        held.hidden,
        held.arguments_of(task.index),
        task.tuning,
        lambda name, weight: held.skeleton.set_parameter(modules[linears[name]], weight),
        held.group,
        held.device,
    )


def _rounded(report: LinearReport, disk: dict[str, Tensor], entry: TensorEntry) -> LinearReport:
    """Return a linear's report once its weight has the dtype that it has on disk."""
    if disk[report.name].dtype == DTYPES[entry.dtype]:
        return report
    disk[report.name] = disk[report.name].to(DTYPES[entry.dtype])
    return recounted(report, disk[report.name])


def _end_block(held: Held, task: BlockTask, reports: Sequence[LinearReport], began: float, begin: float) -> BlockReport:
    """Begin to sync what was written of a block, and forget it. began, begin: by the clock, and monotonic."""
    held.check_hidden(task.index)
    with held.watch.part("files"):
        if task.keep is not None:
            for states, row, position in held.kept_rows(task.keep):
                held.writer.write_rows(task.keep, row, states[position])
        held.writer.sync(lambda: held.synced(task.index))
    held.drop_block(task.index)
    return BlockReport(
        task.index,
        tuple(reports),
        began,
        time.monotonic() - begin,
        held.watch.read(),
        held.moved_bytes,
        held.peak_vram_bytes(),
        held.scratch_bytes(),
    )


def _rows_of(matrix_RC: Tensor, first: int, last: int) -> Tensor:
    return matrix_RC[first:last].clone()
