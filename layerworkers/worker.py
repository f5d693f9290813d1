"""One worker: it holds the skeleton, its calibration samples' hidden states, and one block at a time."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor

from billhook.layerworkers.activations import Activations
from billhook.layerworkers.allocator import return_free_pages, return_large_blocks
from billhook.layerworkers.auxiliaries import Auxiliaries, alternate, alternated, network_of
from billhook.layerworkers.besa import LearnTask, learn_block
from billhook.layerworkers.block_facts import Arguments, InputGroup
from billhook.layerworkers.candidates import BranchTask, Deviation, LoadedBlock, run_branches
from billhook.layerworkers.collected import write_collected
from billhook.layerworkers.collective import Collective, Counted
from billhook.layerworkers.errors import BlockLostError, UnsupportedModelError
from billhook.layerworkers.fitting import BlockFit, Solve
from billhook.layerworkers.gradients import Samples
from billhook.layerworkers.head import Head
from billhook.layerworkers.lockstep import DenseStream, run_observed, run_plain
from billhook.layerworkers.losses import loss_gradient, window_comparison, window_loss
from billhook.layerworkers.methods import Alternation
from billhook.layerworkers.observing import ScoreFacts, observe_scores
from billhook.layerworkers.output_files import LocalFiles, OutputFiles
from billhook.layerworkers.problem import RowsOf
from billhook.layerworkers.reconstruction import tune_if_better
from billhook.layerworkers.reduction import Node
from billhook.layerworkers.regional import output_gradient_squares, regional, tune_in_rounds
from billhook.layerworkers.reverse import ReverseTask, WrittenRoots, go_back
from billhook.layerworkers.scratch import DiskParking, MemoryParking, Parking
from billhook.layerworkers.shards import DTYPES, TensorEntry, read_rows
from billhook.layerworkers.skeleton import Skeleton, same_arguments
from billhook.layerworkers.solving import Together, left_dense, recounted, solve_stage, sum_over_workers
from billhook.layerworkers.statistics import Statistic
from billhook.layerworkers.stopwatch import Stopwatch
from billhook.layerworkers.tasks import (
    BlockReport,
    BlockTask,
    LinearReport,
    LinearTask,
    ModuleTensor,
    ObserveTask,
    Reconstruction,
    Sample,
    StemTask,
    WindowComparison,
    WindowLoss,
    WorkerSetup,
)
from billhook.layerworkers.transfer import BlockReader, BlockWriter, check_finite


class BlockWorker:
    """Runs blocks of one model over its share of the samples, in step with the other workers of ``group``."""

    def __init__(
        self,
        setup: WorkerSetup,
        group: Collective,
        synced: Callable[[int], None] = lambda index: None,
        files: OutputFiles | None = None,
        reference: BlockWorker | None = None,
    ):
        """synced: called from another thread once this worker's share of a pruned block is on the disk.

        files: how it reads and writes the output; None: its machine sees it. reference: a worker with the same samples
        and another model, which this one is compared with.
        """
        return_large_blocks()
        self._setup, self._synced, self._reference = setup, synced, reference
        self._watch = Stopwatch()
        self._group = Counted(group, self._count_moved, self._watch)
        self._moved_bytes = 0
        self._device = torch.device(setup.device)
        if self._device.type == "cpu":
            torch.set_num_threads(setup.threads)
        else:
            torch.backends.cuda.matmul.allow_tf32 = False
        self._skeleton = Skeleton(
            Path(setup.source.folder),
            getattr(torch, setup.dtype),
            self._device,
            setup.trust_remote_code,
            setup.separate_experts,
            setup.route_all,
        )
        files = files or LocalFiles(setup.output)
        self._reader = BlockReader(setup.output.folder if setup.output is not None else "", files)
        self._writer = BlockWriter(files)
        self._samples: list[Sample] = []
        self._hidden, self._dense = Activations(self._device, None), Activations(self._device, None)
        self._arguments: list[Arguments] | None = None

    def start(self, task: StemTask, samples: Sequence[Sample]) -> None:
        """Embed this worker's samples (consecutive, in order, all of one length) and learn the blocks' arguments.

        Raises:
            InputError: when a tensor holds NaN, or a block's arguments depend on the tokens.
        """
        self._stem, self._head = task, Head(task.head)
        for tensor in task.tensors:
            self._skeleton.set_parameter(tensor.module_name, self._reader.read(tensor.entry))
        self._samples, self._arguments = list(samples), None
        self._candidates: list[Activations] = []
        self._entered: list[Activations] = []
        self._hidden, self._dense = self._new_stream(), self._new_stream()
        for sample in self._samples:
            tokens = torch.tensor(sample.tokens, dtype=torch.int64)
            hidden, arguments = self._skeleton.begin(tokens, self._embedding_rows)
            self._hidden.append(hidden)
            if self._setup.dense_stream:
                self._dense.append(hidden.clone())
            if self._arguments is None:
                self._arguments = arguments
            elif not same_arguments(self._arguments, arguments):
                raise UnsupportedModelError(
                    f"{type(self._skeleton.model).__name__}: the blocks' arguments depend on the tokens; "
                    "this architecture is not supported yet"
                )

    def restore_inputs(self, entry: TensorEntry) -> None:
        """Replace the hidden states of this worker's samples by those kept in ``entry``: bytes, row by row.

        There is a row for each sample, in the order of all workers' samples; those of a dense stream come after.

        Raises:
            RunError: when the disk fails.
        """
        for states, row, position in self._rows(entry):
            hidden = states[position]
            kept = read_rows(entry, row, row + 1, self._reader.bytes_of)
            states[position] = kept.view(hidden.dtype).view(hidden.shape).to(self._device)

    @property
    def _streams(self) -> list[Activations]:
        return [self._hidden, self._dense] if self._setup.dense_stream else [self._hidden]

    def _rows(self, entry: TensorEntry) -> Iterator[tuple[Activations, int, int]]:
        """Yield which hidden state of which stream is which row of kept inputs: (stream, row, position)."""
        for number, states in enumerate(self._streams):
            first = number * (entry.shape[0] // len(self._streams))
            for position, sample in enumerate(self._samples):
                yield states, first + sample.index, position

    @torch.inference_mode()
    def prune_block(self, task: BlockTask) -> BlockReport:
        """Prune one block, begin to write this worker's share of its tensors, and carry the samples through it.

        Fitted in ``lockstep``, a linear sees inputs that passed the sparse linears before it, in one forward pass.
        Fitted to the ``dense-block``, it sees what the dense block gives it, and a second pass carries the samples on.
        The share of the block before is on the disk when this returns.

        Raises:
            InputError: when a weight is NaN or infinite: the tensor is named.
            RunError: when a solve or the disk fails.
        """
        began, begin = time.time(), time.monotonic()
        disk = self._begin_block(task)
        entries = {tensor.entry.name: tensor for tensor in task.tensors}
        pruned = {linear.disk_name for linear in task.linears}
        own = {entry.name for entry in self._own_share(task)}
        for entry in self._own_share(task):
            if entry.name not in pruned:
                self._writer.write(task.output, entry, disk.get(entry.name))
        reports: dict[str, LinearReport] = {}
        beside = self._begin_dense(task)
        again, how = alternated(task.linears, self._skeleton.facts(task.index).feed_forward)
        dense = {linear.disk_name: disk[linear.disk_name].clone() for linear in again}
        inputs = self._copied_inputs() if task.tuning.epochs or again else None
        changing = {linear.disk_name for linear in task.linears} if task.tuning.epochs else set(dense)
        gradient_squares = self._tune_region(task, disk) | {
            name: WrittenRoots(entry, self._reader.bytes_of) for name, entry in task.gradients.items()
        }

        def solve(groups: Sequence[Together]) -> None:
            with self._watch.part("solving"):
                for report in solve_stage(groups, disk, task, self._group, self._device, self._watch, gradient_squares):
                    reports[report.name] = self._rounded(report, disk, entries[report.name].entry)
                    self._skeleton.set_parameter(entries[report.name].module_name, disk[report.name])
                    if report.name in own - changing:
                        self._writer.write(task.output, entries[report.name].entry, disk[report.name])

        fit = self._fit_of(task, solve, beside)
        if task.collected:
            fit.run_without_samples()
        else:
            fit.run(self._hidden, self._arguments_of(task.index))
        reconstruction = None
        if inputs is not None and again:
            reports |= self._alternate(task, again, how, dense, disk, inputs)
        if inputs is not None and task.tuning.epochs:
            removed_from = [name for name, report in reports.items() if report.removed]
            reconstruction = self._reconstruct(task, disk, removed_from, inputs)
            reports = {name: recounted(report, disk[name]) for name, report in reports.items()}
        if inputs is not None:
            del inputs[:]  # those that are parked give their places back
        for linear in task.linears:
            name = linear.disk_name
            if name not in reports:
                reports[name] = left_dense(linear, disk[name])
                changing.add(name)
            if name in own & changing:
                self._writer.write(task.output, entries[name].entry, disk[name])
            reports[name] = fit.described(reports[name], linear.name, entries[name].entry.transposed)
        disk.clear()
        ordered = tuple(reports[linear.disk_name] for linear in task.linears)
        return replace(self._end_block(task, ordered, began, begin), reconstruction=reconstruction)

    def _tune_region(self, task: BlockTask, disk: dict[str, Tensor]) -> dict[str, RowsOf]:
        """Return the mean squared gradients of the weights whose methods ask for them, by name on disk.

        Where these tune the block first, the weights in ``disk`` are in float32 from now on.
        """
        linears, rounds = regional(task.linears)
        if not linears:
            return {}
        block, arguments = self._skeleton.blocks[task.index], self._arguments_of(task.index)
        indices = [sample.index for sample in self._samples]
        names = {linear.name: linear.disk_name for linear in linears}
        modules = {tensor.entry.name: tensor.module_name for tensor in task.tensors}
        targets = self._copied_inputs()
        run_plain(block, targets, arguments)
        samples = Samples(indices, self._hidden, targets, task.partition_samples, task.partitions)
        parking = self._parking(task.placement.statistics)
        found = output_gradient_squares(block, list(names), samples, arguments, parking, self._group, self._device)
        squares: dict[str, RowsOf] = {names[name]: partial(_rows_of, found[name]) for name in found}
        if rounds.count:
            disk.update({name: disk[name].float() for name in names.values()})

        def put(name: str, weight: Tensor) -> None:
            self._skeleton.set_parameter(modules[names[name]], weight)

        def solve(groups: Sequence[Together]) -> None:
            with self._watch.part("solving"):
                for report in solve_stage(groups, disk, task, self._group, self._device, self._watch, squares):
                    self._skeleton.set_parameter(modules[report.name], disk[report.name])

        def prune() -> None:
            inputs = self._copied_inputs()
            self._fit_of(replace(task, linears=tuple(linears)), solve).run(inputs, arguments)
            del inputs[:]  # those that are parked give their places back

        masters = {name: disk[disk_name] for name, disk_name in names.items()}
        tune_in_rounds(block, masters, samples, arguments, rounds, prune, put, self._group, self._device)
        del targets[:]
        return squares

    @staticmethod
    def _rounded(report: LinearReport, disk: dict[str, Tensor], entry: TensorEntry) -> LinearReport:
        """Return a linear's report once its weight has the dtype that it has on disk."""
        if disk[report.name].dtype == DTYPES[entry.dtype]:
            return report
        disk[report.name] = disk[report.name].to(DTYPES[entry.dtype])
        return recounted(report, disk[report.name])

    def _begin_dense(self, task: BlockTask) -> DenseStream | None:
        """Return the dense stream where it runs beside; else carry it through the block, which is dense yet."""
        if not self._setup.dense_stream:
            return None
        block = self._skeleton.blocks[task.index]
        if task.fit == "lockstep" and any(linear.correction for linear in task.linears):
            return DenseStream(deepcopy(block), self._dense)
        run_plain(block, self._dense, self._arguments_of(task.index))
        return None

    def _copied_inputs(self) -> Activations:
        """Return copies of the samples' hidden states: those are overwritten."""
        copies = self._new_stream()
        for hidden in self._hidden:
            copies.append(hidden.clone())
        return copies

    def _alternate(
        self,
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
        block, arguments = self._skeleton.blocks[task.index], self._arguments_of(task.index)
        form = self._skeleton.facts(task.index).feed_forward
        assert form is not None
        by_name = {linear.name: linear for linear in linears}
        modules = {tensor.entry.name: tensor.module_name for tensor in task.tensors}
        reports: dict[str, LinearReport] = {}

        def refit(name: str, statistic: Statistic, nodes: list[Node]) -> None:
            linear = replace(by_name[name], correction=1.0)
            together = Together([linear], nodes, statistic, of_output=True, ridge=how.ridge)
            weights = {linear.disk_name: dense[linear.disk_name].clone()}
            with self._watch.part("solving"):
                for report in solve_stage([together], weights, task, self._group, self._device, self._watch):
                    reports[report.name] = report
            disk[linear.disk_name] = weights[linear.disk_name]
            sparse[name] = weights[linear.disk_name]
            self._skeleton.set_parameter(modules[linear.disk_name], weights[linear.disk_name])

        auxiliaries = Auxiliaries(*(self._new_stream() for _ in range(4)))
        entering = InputGroup(form.up, (form.up,))
        run_observed(block, [entering], inputs, arguments, lambda _, __, x: auxiliaries.inputs.append(x))
        sparse = {name: disk[linear.disk_name] for name, linear in by_name.items()}
        alternate(
            network_of(block, form, {name: dense[linear.disk_name] for name, linear in by_name.items()}, sparse),
            auxiliaries,
            [sample.index for sample in self._samples],
            task.partition_samples,
            how,
            refit,
            self._device,
            self._parking(task.placement.statistics),
        )
        auxiliaries.forget()
        for number, hidden in enumerate(inputs):
            self._hidden[number] = hidden.clone()
        run_plain(block, self._hidden, arguments)
        return reports

    def _reconstruct(
        self, task: BlockTask, disk: Mapping[str, Tensor], names: Sequence[str], inputs: Activations
    ) -> Reconstruction:
        """Tune what is kept of linears from which something was removed, if that helps, in ``disk`` and in the block.

        names: theirs on disk. inputs: of the block, of the sparse stream, whose outputs are replaced.
        """
        linears = {linear.name: linear.disk_name for linear in task.linears if linear.disk_name in names}
        modules = {tensor.entry.name: tensor.module_name for tensor in task.tensors}
        return tune_if_better(
            self._skeleton.blocks[task.index],
            {name: disk[disk_name] for name, disk_name in linears.items()},
            Samples(
                [sample.index for sample in self._samples], inputs, self._dense, task.partition_samples, task.partitions
            ),
            self._hidden,
            self._arguments_of(task.index),
            task.tuning,
            lambda name, weight: self._skeleton.set_parameter(modules[linears[name]], weight),
            self._group,
            self._device,
        )

    @torch.inference_mode()
    def collect_block(self, task: BlockTask) -> BlockReport:
        """Write the statistics of the inputs of a block as it is, and carry the samples through it.

        They are summed over all workers, each input's on another one, which writes them. The share of the block before
        is on the disk when this returns.

        Raises:
            InputError, RunError: as :meth:`prune_block`.
        """
        began, begin = time.time(), time.monotonic()
        disk = self._begin_block(task)
        collectors = itertools.cycle(range(self._group.size))

        def collect(groups: Sequence[Together]) -> None:
            for together in groups:
                if together.statistic is None:  # of an expert that too few tokens are sent to
                    continue
                columns = disk[together.linears[0].disk_name].shape[1]
                with self._watch.part("statistics"):
                    shape = together.statistic.shape(columns)
                    total = sum_over_workers(
                        shape, together.nodes, task.partitions, self._group, next(collectors), self._device
                    )
                if total is not None and together.collected is not None:
                    with self._watch.part("files"):
                        write_collected(total, together.collected, self._writer.write_rows)

        fit = self._fit_of(task, collect)
        fit.run(self._hidden, self._arguments_of(task.index))
        entries = {tensor.entry.name: tensor.entry for tensor in task.tensors}
        reports = [
            fit.described(left_dense(linear, disk[linear.disk_name]), linear.name, entries[linear.disk_name].transposed)
            for linear in task.linears
        ]
        disk.clear()
        return self._end_block(task, reports, began, begin)

    def _begin_block(self, task: BlockTask) -> dict[str, Tensor]:
        """Load a block, begin to read the next; return its tensors as on disk, by name."""
        self._moved_bytes = 0
        self._watch.read()
        if not task.placement.read_ahead:
            with self._watch.part("files"):
                self._writer.wait_written()  # there is no room for the last block beside this one
        disk = self._load(task.tensors)
        if task.placement.read_ahead:
            self._reader.begin(task.next_tensors, self._writer.written)
        return disk

    def _fit_of(self, task: BlockTask, solve: Solve, beside: DenseStream | None = None) -> BlockFit:
        return BlockFit(
            self._skeleton.blocks[task.index],
            self._skeleton.facts(task.index).input_groups,
            task,
            [sample.index for sample in self._samples],
            self._device,
            self._parking,
            self._group,
            self._watch,
            solve,
            beside,
        )

    def _end_block(self, task: BlockTask, reports: Sequence[LinearReport], began: float, begin: float) -> BlockReport:
        """Begin to sync what was written of a block, and forget it. began, begin: by the clock, and monotonic."""
        self._check_hidden(task.index)
        with self._watch.part("files"):
            if task.keep is not None:
                for states, row, position in self._rows(task.keep):
                    self._writer.write_rows(task.keep, row, states[position])
            self._writer.sync(lambda: self._synced(task.index))
        self._drop_block(task.index)
        return BlockReport(
            task.index,
            tuple(reports),
            began,
            time.monotonic() - begin,
            self._watch.read(),
            self._moved_bytes,
            self.peak_vram_bytes(),
            self.scratch_bytes(),
        )

    def forward_block(
        self,
        index: int,
        tensors: Sequence[ModuleTensor],
        next_tensors: Sequence[ModuleTensor] = (),
        dense_tensors: Sequence[ModuleTensor] = (),
    ) -> None:
        """Carry the samples through block ``index`` as it is on disk; read ``next_tensors`` meanwhile.

        dense_tensors: of the dense model's block, through which the dense stream goes, if there is one.
        """
        if self._setup.dense_stream:
            self._load(dense_tensors)
            run_plain(self._skeleton.blocks[index], self._dense, self._arguments_of(index))
        self._load(tensors)
        self._reader.begin(next_tensors)
        run_plain(self._skeleton.blocks[index], self._hidden, self._arguments_of(index))
        self._check_hidden(index)
        self._drop_block(index)

    @torch.inference_mode()
    def observe_block(self, task: ObserveTask) -> list[ScoreFacts]:
        """Return what the block's scores are like on these samples, and carry them through it as it is on disk."""
        disk = self._load(task.tensors)
        self._reader.begin(task.next_tensors)
        block, arguments = self._skeleton.blocks[task.index], self._arguments_of(task.index)
        facts = observe_scores(
            block,
            self._skeleton.facts(task.index).input_groups,
            dict(task.linears),
            disk,
            [sample.index for sample in self._samples],
            task.partition_samples,
            task.partitions,
            task.multiple,
            self._hidden,
            arguments,
            self._device,
            self._group,
        )
        run_plain(block, self._hidden, arguments)
        self._check_hidden(task.index)
        disk.clear()
        self._drop_block(task.index)
        return facts

    @torch.inference_mode()
    def branch_block(self, task: BranchTask) -> list[Deviation]:
        """Carry streams through a block and split them; return how each branch deviates from the dense block.

        The samples are the only stream before the first block. See :func:`run_branches`.

        Raises:
            InputError: when a weight is NaN or infinite: the tensor is named.
            RunError: when a hidden state is not finite, or the disk fails.
        """
        disk = self._load(task.tensors)
        self._reader.begin(task.next_tensors)
        self._candidates, deviations = run_branches(
            self._loaded(task, disk),
            self._candidates or [self._hidden],
            task.branches,
            self._samples,
            task.samples,
            self._new_stream,
            self._device,
            self._group,
        )
        for states in self._candidates:
            self._check_finite_states(task.index, states)
        disk.clear()
        self._drop_block(task.index)
        return deviations

    def _loaded(self, task: BranchTask | LearnTask, disk: Mapping[str, Tensor]) -> LoadedBlock:
        modules = {tensor.entry.name: tensor.module_name for tensor in task.tensors}
        return LoadedBlock(
            self._skeleton.blocks[task.index],
            self._skeleton.facts(task.index).input_groups,
            dict(task.linears),
            disk,
            lambda name, weight: self._skeleton.set_parameter(modules[name], weight),
            self._arguments_of(task.index),
        )

    def _new_stream(self) -> Activations:
        return Activations(self._device, self._parking(self._setup.activations))

    @torch.inference_mode()
    def learn_block(self, task: LearnTask) -> list[float]:
        """Return how sparse the block's linears should be, and carry the samples through it pruned so.

        Beside runs the dense stream. See :func:`billhook.layerworkers.besa.learn_block`.

        Raises:
            InputError, RunError: as :meth:`branch_block`.
        """
        disk = self._load(task.tensors)
        self._reader.begin(task.next_tensors)
        shares = learn_block(
            self._loaded(task, disk),
            self._hidden,
            self._dense,
            task.learning,
            [sample.index for sample in self._samples],
            task.samples,
            self._device,
            self._group,
        )
        self._check_hidden(task.index)
        disk.clear()
        self._drop_block(task.index)
        return shares

    @torch.inference_mode()
    def enter_block(
        self, index: int, tensors: Sequence[ModuleTensor], next_tensors: Sequence[ModuleTensor] = ()
    ) -> None:
        """Carry the samples through a dense block, and keep what entered it; read ``next_tensors`` meanwhile.

        Raises:
            InputError, RunError: as :meth:`branch_block`.
        """
        self._load(tensors)
        self._reader.begin(next_tensors)
        self._entered.append(self._copied_inputs())
        run_plain(self._skeleton.blocks[index], self._hidden, self._arguments_of(index))
        self._check_hidden(index)
        self._drop_block(index)

    def turn_back(self) -> None:
        """Replace each sample's hidden state beyond the last block by the gradient by it of the sample's loss.

        It is that of the summed cross-entropy of all its targets.

        Raises:
            RunError: when a logit is not finite.
        """
        for number, sample in enumerate(self._samples):

            def gradient_of(logits: Tensor, sample: Sample = sample) -> Tensor:
                return loss_gradient(logits[0], sample, self._device)[None]

            self._hidden[number] = self._skeleton.output_gradient(self._hidden[number], self._head, gradient_of)

    @torch.inference_mode()
    def leave_block(self, task: ReverseTask) -> None:
        """Take gradients back through the block that was entered last; see :func:`go_back`.

        Raises:
            InputError: when a weight is NaN or infinite: the tensor is named.
            RunError: when a gradient is not finite, or the disk fails.
        """
        self._load(task.tensors)
        self._reader.begin(task.next_tensors)
        inputs = self._entered.pop()
        go_back(
            self._skeleton.blocks[task.index],
            task,
            [sample.index for sample in self._samples],
            inputs,
            self._hidden,
            self._arguments_of(task.index),
            self._parking(task.statistics),
            self._writer,
            self._group,
            self._device,
        )
        del inputs[:]  # those that are parked give their places back
        self._writer.sync(lambda: None)
        self._drop_block(task.index)

    def candidate_losses(self) -> list[list[WindowLoss]]:
        """Return the losses of this worker's samples, as :meth:`losses` does, for each stream beyond the last block."""
        return [
            [
                window_loss(self._skeleton.finish(hidden, self._head)[0], sample, self._device)
                for hidden, sample in zip(states, self._samples, strict=True)
            ]
            for states in self._candidates
        ]

    def finish_writing(self) -> None:
        """Wait until this worker's share of every pruned block is on the disk.

        Raises:
            RunError: when a write or sync failed.
        """
        self._writer.wait()

    def logits(self, index: int) -> Tensor:
        """Return the logits [1, T, V] of this worker's ``index``-th sample, whose hidden state left the last block."""
        return self._skeleton.finish(self._hidden[index], self._head)

    def losses(self) -> list[WindowLoss]:
        """Return the mean next-token cross-entropy of each of this worker's samples."""
        return [
            window_loss(self.logits(number)[0], sample, self._device) for number, sample in enumerate(self._samples)
        ]

    def comparisons(self) -> list[WindowComparison]:
        """Return how far each sample's predictions are from those of the reference, whose blocks it has left, too."""
        assert self._reference is not None
        return [
            window_comparison(self._reference.logits(number)[0], self.logits(number)[0], sample, self._device)
            for number, sample in enumerate(self._samples)
        ]

    @property
    def doing(self) -> str:
        """What it spends its time on at the moment: one of :data:`billhook.layerworkers.stopwatch.PARTS`."""
        return self._watch.current

    def peak_vram_bytes(self) -> int:
        """Return the most memory that torch has held on this worker's GPU; 0 on a CPU."""
        return torch.cuda.max_memory_reserved(self._device) if self._device.type == "cuda" else 0

    def scratch_bytes(self) -> int:
        """Return the most that this worker has had in its scratch file."""
        own = self._disk_parking.peak_bytes if "_disk_parking" in self.__dict__ else 0
        return own + (self._reference.scratch_bytes() if self._reference is not None else 0)

    def _load(self, tensors: Sequence[ModuleTensor]) -> dict[str, Tensor]:
        """Read the block's tensors into the module; return them as on disk, by name."""
        disk: dict[str, Tensor] = {}
        for tensor in tensors:
            with self._watch.part("files"):
                disk[tensor.entry.name] = self._reader.read(tensor.entry)
            self._skeleton.set_parameter(tensor.module_name, disk[tensor.entry.name])
        return disk

    def _drop_block(self, index: int) -> None:
        self._skeleton.drop_block(index)
        return_free_pages()

    def _own_share(self, task: BlockTask) -> list[TensorEntry]:
        """Return what this worker writes of the block: every ``size``-th tensor."""
        return [*(tensor.entry for tensor in task.tensors), *task.others][self._group.rank :: self._group.size]

    def _parking(self, tier: str) -> Parking | None:
        """Return where tensors of a tier are parked; None where they stay on the device."""
        if tier == "device":
            return None
        return MemoryParking() if tier == "ram" else self._disk_parking

    @cached_property
    def _disk_parking(self) -> DiskParking:
        return DiskParking(self._setup.scratch)

    def _count_moved(self, size_bytes: int) -> None:
        self._moved_bytes += size_bytes

    def _check_hidden(self, index: int) -> None:
        for states in self._streams:
            self._check_finite_states(index, states)

    def _check_finite_states(self, index: int, states: Activations) -> None:
        for sample, hidden in zip(self._samples, states, strict=True):
            if not torch.isfinite(hidden).all():
                raise BlockLostError(
                    f"block {index}: the output for sample {sample.index} is not finite in {hidden.dtype}; "
                    "try --dtype float32"
                )

    def _arguments_of(self, index: int) -> Arguments | None:
        return None if self._arguments is None else self._arguments[index]

    def _embedding_rows(self, tokens: Tensor) -> Tensor:
        """Read the embedding rows of ``tokens`` [U] (ascending), [U, H]: runs of consecutive rows in one read."""
        entry, ids = self._stem.embedding, tokens.tolist()
        runs: list[list[int]] = []
        for token in ids:
            if runs and token == runs[-1][1]:
                runs[-1][1] += 1
            else:
                runs.append([token, token + 1])
        rows = torch.cat([read_rows(entry, start, stop) for start, stop in runs])
        check_finite(entry, rows)
        return rows.to(self._device, self._skeleton.dtype)


def _rows_of(matrix_RC: Tensor, first: int, last: int) -> Tensor:
    return matrix_RC[first:last].clone()
