"""Passes over a model that prune nothing: a worker evaluates, observes, tries candidates, learns and goes back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from billhook.layerworkers.activations import Activations
from billhook.layerworkers.besa import LearnTask
from billhook.layerworkers.besa import learn_block as learn
from billhook.layerworkers.candidates import BranchTask, Deviation, LoadedBlock, run_branches
from billhook.layerworkers.held import Held
from billhook.layerworkers.lockstep import run_plain
from billhook.layerworkers.losses import loss_gradient
from billhook.layerworkers.observing import ScoreFacts, observe_scores
from billhook.layerworkers.reverse import ReverseTask, go_back
from billhook.layerworkers.tasks import ModuleTensor, ObserveTask, Sample


def forward_block(
    held: Held,
    index: int,
    tensors: Sequence[ModuleTensor],
    next_tensors: Sequence[ModuleTensor] = (),
    dense_tensors: Sequence[ModuleTensor] = (),
) -> None:
    """Carry the samples through block ``index`` as it is on disk; read ``next_tensors`` meanwhile.

    dense_tensors: of the dense model's block, through which the dense stream goes, if there is one.
    """
    if held.setup.dense_stream:
        held.load(dense_tensors)
        run_plain(held.skeleton.blocks[index], held.dense, held.arguments_of(index))
    held.load(tensors)
    held.reader.begin(next_tensors)
    run_plain(held.skeleton.blocks[index], held.hidden, held.arguments_of(index))
    held.check_hidden(index)
    held.drop_block(index)


@torch.inference_mode()
def observe_block(held: Held, task: ObserveTask) -> list[ScoreFacts]:
    """Return what the block's scores are like on these samples, and carry them through it as it is on disk."""
    disk = held.load(task.tensors)
    held.reader.begin(task.next_tensors)
    block, arguments = held.skeleton.blocks[task.index], held.arguments_of(task.index)
    facts = observe_scores(
        block,
        held.skeleton.facts(task.index).input_groups,
        dict(task.linears),
        disk,
        held.indices,
        task.partition_samples,
        task.partitions,
        task.multiple,
        held.hidden,
        arguments,
        held.device,
        held.group,
    )
    run_plain(block, held.hidden, arguments)
    held.check_hidden(task.index)
    disk.clear()
    held.drop_block(task.index)
    return facts


@torch.inference_mode()
def branch_block(
    held: Held, streams: Sequence[Activations], task: BranchTask
) -> tuple[list[Activations], list[Deviation]]:
    """Carry streams through a block and split them; return the branches, and how each deviates from the dense block.

    See :func:`run_branches`.

    Raises:
        InputError: when a weight is NaN or infinite: the tensor is named.
        RunError: when a hidden state is not finite, or the disk fails.
    """
    disk = held.load(task.tensors)
    held.reader.begin(task.next_tensors)
    branches, deviations = run_branches(
        _loaded(held, task, disk),
        streams,
        task.branches,
        held.samples,
        task.samples,
        held.new_stream,
        held.device,
        held.group,
    )
    for states in branches:
        held.check_states(task.index, states)
    disk.clear()
    held.drop_block(task.index)
    return branches, deviations


def _loaded(held: Held, task: BranchTask | LearnTask, disk: Mapping[str, Tensor]) -> LoadedBlock:
    modules = {tensor.entry.name: tensor.module_name for tensor in task.tensors}
    return LoadedBlock(
        held.skeleton.blocks[task.index],
        held.skeleton.facts(task.index).input_groups,
        dict(task.linears),
        disk,
        lambda name, weight: held.skeleton.set_parameter(modules[name], weight),
        held.arguments_of(task.index),
    )


@torch.inference_mode()
def learn_block(held: Held, task: LearnTask) -> list[float]:
    """Return how sparse the block's linears should be, and carry the samples through it pruned so.

    Beside runs the dense stream. See :func:`billhook.layerworkers.besa.learn_block`.

    Raises:
        InputError, RunError: as :func:`branch_block`.
    """
    disk = held.load(task.tensors)
    held.reader.begin(task.next_tensors)
    shares = learn(
        _loaded(held, task, disk),
        held.hidden,
        held.dense,
        task.learning,
        held.indices,
        task.samples,
        held.device,
        held.group,
    )
    held.check_hidden(task.index)
    disk.clear()
    held.drop_block(task.index)
    return shares


@torch.inference_mode()
def enter_block(
    held: Held, index: int, tensors: Sequence[ModuleTensor], next_tensors: Sequence[ModuleTensor] = ()
) -> Activations:
    """Carry the samples through a dense block, and return what entered it; read ``next_tensors`` meanwhile.

    Raises:
        InputError, RunError: as :func:`branch_block`.
    """
    held.load(tensors)
    held.reader.begin(next_tensors)
    inputs = held.copied_inputs()
    run_plain(held.skeleton.blocks[index], held.hidden, held.arguments_of(index))
    held.check_hidden(index)
    held.drop_block(index)
    return inputs


def turn_back(held: Held) -> None:
    """Replace each sample's hidden state beyond the last block by the gradient by it of the sample's loss.

    It is that of the summed cross-entropy of all its targets.

    Raises:
        RunError: when a logit is not finite.
    """
    for number, sample in enumerate(held.samples):

        def gradient_of(logits: Tensor, sample: Sample = sample) -> Tensor:
            return loss_gradient(logits[0], sample, held.device)[None]

        held.hidden[number] = held.skeleton.output_gradient(held.hidden[number], held.head, gradient_of)


@torch.inference_mode()
def leave_block(held: Held, inputs: Activations, task: ReverseTask) -> None:
    """Take gradients back through a block that ``inputs`` entered; see :func:`go_back`.

    Raises:
        InputError: when a weight is NaN or infinite: the tensor is named.
        RunError: when a gradient is not finite, or the disk fails.
    """
    held.load(task.tensors)
    held.reader.begin(task.next_tensors)
    go_back(
        held.skeleton.blocks[task.index],
        task,
        held.indices,
        inputs,
        held.hidden,
        held.arguments_of(task.index),
        held.parking(task.statistics),
        held.writer,
        held.group,
        held.device,
    )
    del inputs[:]  # those that are parked give their places back
    held.writer.sync(lambda: None)
    held.drop_block(task.index)
