"""Gradients of the whole model's loss, block by block: forward, keeping what enters each, and back.

For each block what comes back is the gradient of the loss by its output, sample by sample; the block is run once more,
differentiated, and hands on the gradient by its input. So no more than one block is there at once.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableSequence, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from billhook.layerworkers.block_facts import Arguments
from billhook.layerworkers.collective import Collective
from billhook.layerworkers.errors import NotFiniteError
from billhook.layerworkers.gradients import Differentiable, GradientSquares
from billhook.layerworkers.scratch import Parking, bands
from billhook.layerworkers.shards import DTYPES, Read, TensorEntry, read_rows
from billhook.layerworkers.tasks import ModuleTensor
from billhook.layerworkers.transfer import BlockWriter


@dataclass(frozen=True)
class ReverseTask:
    """One dense block that gradients come back through."""

    index: int
    tensors: tuple[ModuleTensor, ...]
    written: Mapping[str, TensorEntry]
    """Where the root mean squares of gradients go, [R, C], by the names of the linears in the block."""
    samples: int
    """Over all workers."""
    targets: int
    """Tokens that a sample's loss is a mean over."""
    partition_samples: int
    """Consecutive samples whose squares are summed together."""
    statistics: str
    """As of :class:`billhook.layerworkers.tasks.Placement`."""
    next_tensors: tuple[ModuleTensor, ...] = ()
    """What will be loaded after this block; read while it is computed."""

    @property
    def partitions(self) -> int:
        """Of the samples of all workers."""
        return -(-self.samples // self.partition_samples)


def go_back(
    block: nn.Module,
    task: ReverseTask,
    samples: Sequence[int],
    inputs: Sequence[Tensor],
    gradients: MutableSequence[Tensor],
    arguments: Arguments | None,
    parking: Parking | None,
    writer: BlockWriter,
    group: Collective,
    device: torch.device,
) -> None:
    """Write the root mean squares, over all workers' samples, of a loss's gradients by a block's linears; collective.

    The loss is a sample's mean over its targets; what comes in and goes out are gradients of the sum, which in 16 bits
    do not vanish. Each linear's are summed and written on another worker.

    samples: indices of this worker's, whose block inputs are ``inputs`` [1, T, H]. gradients: of the loss by the
    block's output, each replaced by that by its input. parking: where partial sums wait; None: on the device.

    Raises:
        RunError: when a gradient is not finite, or the disk fails.
    """
    differentiable = Differentiable(block, list(task.written), arguments)
    squares = GradientSquares(differentiable, task.partition_samples, device, parking)
    for number, index in enumerate(samples):
        by_weights, by_input = differentiable.of_weights_and_input(inputs[number], gradients[number])
        if not torch.isfinite(by_input).all():
            raise NotFiniteError(
                f"block {task.index}: the gradient of sample {index} is not finite in {by_input.dtype}; try --dtype "
                "float32, or bfloat16"
            )
        squares.add(index, by_weights)
        gradients[number] = by_input
    for name, total in squares.reduced(task.partitions, group):
        if total is not None:
            write_roots(total, task, task.written[name], writer)


def write_roots(total: Tensor, task: ReverseTask, entry: TensorEntry, writer: BlockWriter) -> None:
    """Write the root mean squares whose sums ``total`` [R, C] has, a few rows at a time; it may be overwritten."""
    for start, stop in bands(total.shape):
        roots_RC = total[start:stop].div_(task.samples).sqrt_().div_(task.targets)
        writer.write_rows(entry, start, roots_RC.to("cpu", DTYPES[entry.dtype]))


@dataclass(frozen=True)
class WrittenRoots:
    """Root mean squares of gradients on disk."""

    entry: TensorEntry
    read: Read

    def __call__(self, first: int, last: int) -> Tensor:
        """Return the mean squares of some rows, [rows, C] float32.

        Raises:
            RunError: when the disk fails.
        """
        return read_rows(self.entry, first, last, self.read).float().square_()
