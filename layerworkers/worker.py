"""One worker: what the workers of a group are asked to do, all together, block by block."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from billhook.layerworkers import passes, pruning
from billhook.layerworkers.activations import Activations
from billhook.layerworkers.allocator import return_large_blocks
from billhook.layerworkers.besa import LearnTask
from billhook.layerworkers.candidates import BranchTask, Deviation
from billhook.layerworkers.collective import Collective
from billhook.layerworkers.held import Held
from billhook.layerworkers.losses import window_comparison, window_loss
from billhook.layerworkers.observing import ScoreFacts
from billhook.layerworkers.output_files import OutputFiles
from billhook.layerworkers.reverse import ReverseTask
from billhook.layerworkers.shards import TensorEntry, read_rows
from billhook.layerworkers.tasks import (
    BlockReport,
    BlockTask,
    ModuleTensor,
    ObserveTask,
    Sample,
    StemTask,
    WindowComparison,
    WindowLoss,
    WorkerSetup,
)


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
        if setup.device == "cpu":
            torch.set_num_threads(setup.threads)
        else:
            torch.backends.cuda.matmul.allow_tf32 = False
        self._held = Held(setup, group, synced, files)
        self._reference = reference

    def start(self, task: StemTask, samples: Sequence[Sample]) -> None:
        """Embed this worker's samples; see :meth:`Held.start`."""
        self._candidates: list[Activations] = []
        self._entered: list[Activations] = []
        self._held.start(task, samples)

    def restore_inputs(self, entry: TensorEntry) -> None:
        """Replace the hidden states of this worker's samples by those kept in ``entry``: bytes, row by row.

        There is a row for each sample, in the order of all workers' samples; those of a dense stream come after.

        Raises:
            RunError: when the disk fails.
        """
        held = self._held
        for states, row, position in held.kept_rows(entry):
            hidden = states[position]
            kept = read_rows(entry, row, row + 1, held.reader.bytes_of)
            states[position] = kept.view(hidden.dtype).view(hidden.shape).to(held.device)

    def prune_block(self, task: BlockTask) -> BlockReport:
        """Prune one block and carry the samples through it; see :func:`pruning.prune_block`."""
        return pruning.prune_block(self._held, task)

    def collect_block(self, task: BlockTask) -> BlockReport:
        """Write the statistics of a block's inputs; see :func:`pruning.collect_block`."""
        return pruning.collect_block(self._held, task)

    def forward_block(
        self,
        index: int,
        tensors: Sequence[ModuleTensor],
        next_tensors: Sequence[ModuleTensor] = (),
        dense_tensors: Sequence[ModuleTensor] = (),
    ) -> None:
        """Carry the samples through a block as it is on disk; see :func:`passes.forward_block`."""
        passes.forward_block(self._held, index, tensors, next_tensors, dense_tensors)

    def observe_block(self, task: ObserveTask) -> list[ScoreFacts]:
        """Return what a block's scores are like on these samples; see :func:`passes.observe_block`."""
        return passes.observe_block(self._held, task)

    def branch_block(self, task: BranchTask) -> list[Deviation]:
        """Carry streams through a block and split them; see :func:`passes.branch_block`.

        The samples are the only stream before the first block.
        """
        self._candidates, deviations = passes.branch_block(self._held, self._candidates or [self._held.hidden], task)
        return deviations

    def learn_block(self, task: LearnTask) -> list[float]:
        """Return how sparse a block's linears should be; see :func:`passes.learn_block`."""
        return passes.learn_block(self._held, task)

    def enter_block(
        self, index: int, tensors: Sequence[ModuleTensor], next_tensors: Sequence[ModuleTensor] = ()
    ) -> None:
        """Carry the samples through a dense block, and keep what entered it; see :func:`passes.enter_block`."""
        self._entered.append(passes.enter_block(self._held, index, tensors, next_tensors))

    def turn_back(self) -> None:
        """Replace hidden states beyond the last block by gradients; see :func:`passes.turn_back`."""
        passes.turn_back(self._held)

    def leave_block(self, task: ReverseTask) -> None:
        """Take gradients back through the block that was entered last; see :func:`passes.leave_block`."""
        passes.leave_block(self._held, self._entered.pop(), task)

    def finish_writing(self) -> None:
        """Wait until this worker's share of every pruned block is on the disk.

        Raises:
            RunError: when a write or sync failed.
        """
        self._held.writer.wait()

    def logits(self, index: int) -> Tensor:
        """Return the logits [1, T, V] of this worker's ``index``-th sample, whose hidden state left the last block."""
        return self._logits(self._held.hidden[index])

    def losses(self) -> list[WindowLoss]:
        """Return the mean next-token cross-entropy of each of this worker's samples."""
        return self._losses(self._held.hidden)

    def candidate_losses(self) -> list[list[WindowLoss]]:
        """Return the losses of this worker's samples, as :meth:`losses` does, for each stream beyond the last block."""
        return [self._losses(states) for states in self._candidates]

    def comparisons(self) -> list[WindowComparison]:
        """Return how far each sample's predictions are from those of the reference, whose blocks it has left, too."""
        assert self._reference is not None
        return [
            window_comparison(self._reference.logits(number)[0], self.logits(number)[0], sample, self._held.device)
            for number, sample in enumerate(self._held.samples)
        ]

    def _losses(self, states: Activations) -> list[WindowLoss]:
        return [
            window_loss(self._logits(hidden)[0], sample, self._held.device)
            for hidden, sample in zip(states, self._held.samples, strict=True)
        ]

    def _logits(self, hidden: Tensor) -> Tensor:
        return self._held.skeleton.finish(hidden, self._held.head)

    @property
    def doing(self) -> str:
        """What it spends its time on at the moment: one of :data:`billhook.layerworkers.stopwatch.PARTS`."""
        return self._held.watch.current

    def peak_vram_bytes(self) -> int:
        """Return the most memory that torch has held on this worker's GPU; 0 on a CPU."""
        return self._held.peak_vram_bytes()

    def scratch_bytes(self) -> int:
        """Return the most that this worker has had in its scratch file, and that of its reference in its own."""
        return self._held.scratch_bytes() + (self._reference.scratch_bytes() if self._reference is not None else 0)
