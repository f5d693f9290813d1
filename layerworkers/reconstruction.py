"""Tune what a sparse block keeps, so that the block's output comes near the dense model's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, MutableSequence, Sequence

import torch
from torch import Tensor, nn

from billhook.layerworkers.block_facts import Arguments
from billhook.layerworkers.collective import Collective, all_gather
from billhook.layerworkers.gradients import Samples, Step, descend
from billhook.layerworkers.lockstep import run_plain
from billhook.layerworkers.tasks import Reconstruction, Tuning

BATCH_PARTITIONS = 2
"""Partitions of the samples whose gradients make a step: it decides bits, and so many workers have something to do."""


def reconstruct(
    block: nn.Module,
    weights: Mapping[str, Tensor],
    samples: Samples,
    arguments: Arguments | None,
    tuning: Tuning,
    group: Collective,
    device: torch.device,
) -> dict[str, Tensor]:
    """Return linears' weights [R, C] after tuning what is not 0 in them, the same on every worker; collective.

    Adam (Kingma & Ba, ICLR 2015) on :func:`relative_error`, of f(x; W) from y, where f is the block, x an input, y its
    target; on the worker that has a linear's float32 weights and moments. block: sparse; left as it is. weights: of its
    linears, by their names in it, in the dtype of what is returned. device: where the block is.
    """
    steps = list(batches(samples.partitions)) * tuning.epochs

    def loss(output: Tensor, position: int) -> Tensor:
        # Times the tokens, so that nothing is too small for the gradients of 16 bits; Adam does not mind.
        return output.shape[-2] * relative_error(output.float(), samples.targets[position].float())

    def begin(weight_RC: Tensor) -> Step:
        kept_RC = weight_RC != 0
        rate = tuning.rate * _size(weight_RC, kept_RC)
        optimiser = torch.optim.Adam([weight_RC], foreach=False)

        def step(number: int, gradient_RC: Tensor) -> None:
            weight_RC.grad = gradient_RC.mul_(kept_RC)
            optimiser.param_groups[0]["lr"] = rate * (1 - number / len(steps))
            optimiser.step()
            weight_RC.grad = None

        return step

    return descend(block, weights, samples, arguments, steps, loss, begin, group, device)


def tune_if_better(
    block: nn.Module,
    weights: Mapping[str, Tensor],
    samples: Samples,
    outputs: MutableSequence[Tensor],
    arguments: Arguments | None,
    tuning: Tuning,
    put: Callable[[str, Tensor], None],
    group: Collective,
    device: torch.device,
) -> Reconstruction:
    """Tune linears' weights as :func:`reconstruct` does, in place; where that does not help, leave them; collective.

    weights: of linears in the sparse block, by their names in it, [R, C] in the dtype on disk. outputs: the block's, of
    this worker's samples; replaced by those with the weights as they are in the end. put: puts a weight into the block,
    given the name of its linear.
    """

    def error_with(values: Mapping[str, Tensor]) -> float:
        for name, value in values.items():
            put(name, value)
        for number in range(len(outputs)):
            outputs[number] = samples.inputs[number].clone()
        run_plain(block, outputs, arguments)
        return output_error(outputs, samples.targets, group)

    before = output_error(outputs, samples.targets, group)
    if not weights:
        return Reconstruction(before, before)
    tuned = reconstruct(block, weights, samples, arguments, tuning, group, device)
    after = error_with(tuned)
    if not after < before:  # nor where it is not a number
        return Reconstruction(before, error_with(weights))
    for name, value in tuned.items():
        weights[name].copy_(value)
    return Reconstruction(before, after)


def relative_error(output: Tensor, target: Tensor) -> Tensor:
    """Return the mean over tokens of ``|f - y|^2 / |y|^2``, of an output f [..., H] and a target y [..., H].

    What follows a block normalises each token by itself; and without that a few huge ones would be all that counts.
    """
    energy = target.square().sum(dim=-1).clamp(min=torch.finfo(target.dtype).tiny)
    return ((output - target).square().sum(dim=-1) / energy).mean()


def output_error(outputs: Sequence[Tensor], targets: Sequence[Tensor], group: Collective) -> float:
    """Return the mean relative error of all workers' outputs; 0 where there are none."""
    pairs = zip(outputs, targets, strict=True)
    own = [float(relative_error(output.double(), target.double())) for output, target in pairs]
    everyone = [error for of_rank in all_gather(group, own) for error in of_rank]
    return math.fsum(everyone) / len(everyone) if everyone else 0.0


def _size(weight: Tensor, kept: Tensor) -> float:
    """Return the root mean square of what is kept of a weight."""
    return math.sqrt(float(weight.double().square().sum()) / max(1, int(kept.sum())))


def batches(partitions: int) -> Iterator[list[int]]:
    """Yield the partitions of each step: far from each other, so that they are on different workers."""
    steps = -(-partitions // BATCH_PARTITIONS)
    for first in range(steps):
        yield list(range(first, partitions, steps))
