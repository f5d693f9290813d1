"""Gradients of a block's linears, sample by sample, and their sums over all workers.

The engine runs under inference mode; what is differentiated here are copies made outside of it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, MutableSequence, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map

from billhook.layerworkers.block_facts import Arguments
from billhook.layerworkers.collective import Collective, broadcast_tensor_
from billhook.layerworkers.lockstep import output_of
from billhook.layerworkers.reduction import Node
from billhook.layerworkers.scratch import Parking
from billhook.layerworkers.solving import sum_over_workers
from billhook.layerworkers.statistics import COLUMN_SQUARES, Accumulator


class Loss(Protocol):
    """What is differentiated."""

    def __call__(self, output: Tensor, position: int) -> Tensor:
        """Return a number, given a sample's output [1, T, H], and which of this worker's samples it is."""


Step = Callable[[int, Tensor], None]
"""``step(number, gradient_RC)`` changes a weight, given which step it is, and the gradient [R, C] float32."""

_ATTENTION = threading.Lock()
"""Held while attention's implementation is chosen and used: torch keeps the choice for the whole process."""


@dataclass(frozen=True)
class Samples:
    """One worker's samples before and after a block."""

    indices: Sequence[int]
    inputs: MutableSequence[Tensor]
    """Of the sparse stream, [1, T, H]."""
    targets: Sequence[Tensor]
    """What the output is to be, [1, T, H]."""
    partition_samples: int
    partitions: int
    """Of all workers together."""


class Differentiable:
    """A block of which gradients are taken: its own parameters may be exchanged meanwhile, these are copies."""

    def __init__(self, block: nn.Module, names: Sequence[str], arguments: Arguments | None):
        """names: of the linears that are differentiated, in the block."""
        self._block, self.names = block, tuple(names)
        with torch.inference_mode(False):
            state = {**dict(block.named_parameters()), **dict(block.named_buffers())}
            self._parameters = {name: value.detach().clone() for name, value in state.items()}
            self._arguments: Arguments | None = tree_map(
                lambda each: each.clone() if isinstance(each, Tensor) else each, arguments
            )

    def weight(self, name: str) -> Tensor:
        """Return the weight [R, C] of a linear, in the compute dtype, to be overwritten."""
        return self._parameters[f"{name}.weight"]

    def of_weights(self, hidden: Tensor, loss: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """Return the gradients of a loss of the output by each weight, [R, C] in the compute dtype.

        hidden: the input, [1, T, H]; left as it is. loss: of the output.
        """
        with torch.inference_mode(False), torch.enable_grad():
            output, leaves = self._output(hidden.clone())
            return list(torch.autograd.grad(loss(output), leaves))

    def of_weights_and_input(self, hidden: Tensor, by_output: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return a number's gradients by each weight, [R, C], and by the input, in the compute dtype.

        hidden: the input, [1, T, H]; left as it is. by_output: the number's gradient by the output, [1, T, H].
        """
        with torch.inference_mode(False), torch.enable_grad():
            given = hidden.clone().requires_grad_()
            output, leaves = self._output(given.clone())
            *by_weights, by_input = torch.autograd.grad(output, [*leaves, given], by_output.clone())
            return by_weights, by_input

    def _output(self, hidden: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the output, and the weights it depends on; the input may be overwritten."""
        assert self._arguments is not None
        args, kwargs = self._arguments
        leaves = {f"{name}.weight": self.weight(name).detach().requires_grad_() for name in self.names}
        # Other implementations sum gradients in an order that changes on a GPU.
        with _ATTENTION, sdpa_kernel(SDPBackend.MATH):
            result = functional_call(self._block, {**self._parameters, **leaves}, (hidden, *args), dict(kwargs))
        return output_of(result), list(leaves.values())


def summed_gradients(
    block: Differentiable, samples: Samples, batch: Sequence[int], loss: Loss
) -> dict[str, list[Node]]:
    """Return the float32 gradients of linears' weights, flat, summed over this worker's samples of some partitions.

    batch: these partitions; a sum's index is a partition's position there.
    """
    sums: dict[str, dict[int, Tensor]] = {name: {} for name in block.names}
    for number, index in enumerate(samples.indices):
        partition = index // samples.partition_samples
        if partition not in batch:
            continue
        gradients = block.of_weights(samples.inputs[number], partial(loss, position=number))
        for name, gradient in zip(block.names, gradients, strict=True):
            flat = gradient.float().flatten()
            before = sums[name].get(partition)
            sums[name][partition] = flat if before is None else before.add_(flat)
    return {
        name: [Node(0, batch.index(partition), own[partition]) for partition in sorted(own)]
        for name, own in sums.items()
    }


def descend(
    block: nn.Module,
    weights: Mapping[str, Tensor],
    samples: Samples,
    arguments: Arguments | None,
    batches: Sequence[Sequence[int]],
    loss: Loss,
    begin: Callable[[Tensor], Step],
    group: Collective,
    device: torch.device,
) -> dict[str, Tensor]:
    """Return linears' weights [R, C] after changing them step by step, the same on every worker; collective.

    Every worker runs its own samples forward and backward through the block. A step's gradients are summed over the
    workers in the fixed tree, each linear's on one worker (:func:`roots_of`), which has its float32 weights and tells
    the others the new ones: so the bytes do not depend on how many there are.

    block: left as it is. weights: of its linears, by their names in it, in the dtype of what is returned. batches: the
    partitions of each step. begin: given a linear's weight [R, C] float32, returns what changes it in place. device:
    where the block is.
    """
    with torch.inference_mode(False):
        changed = {name: weight.to("cpu", copy=True) for name, weight in weights.items()}
        roots = roots_of(list(weights), group)
        own = {
            name: weights[name].to(device, torch.float32, copy=True) for name in weights if roots[name] == group.rank
        }
        steps = {name: begin(weight) for name, weight in own.items()}
        copies = Differentiable(block, list(weights), arguments)
        for number, batch in enumerate(batches):
            nodes = summed_gradients(copies, samples, batch, loss)
            for name, root in roots.items():
                weight = copies.weight(name)
                total = sum_over_workers((weight.numel(),), nodes.pop(name), len(batch), group, root, device)
                if total is not None:
                    steps[name](number, total.view(weight.shape))
                    weight.copy_(own[name])
                broadcast_tensor_(group, root, weight)
        for name, root in roots.items():
            if name in own:
                changed[name].copy_(own[name])
            broadcast_tensor_(group, root, changed[name])
    return changed


def roots_of(names: Sequence[str], group: Collective) -> dict[str, int]:
    """Return on which worker the gradients of each linear are summed."""
    return {name: number % group.size for number, name in enumerate(names)}


class GradientSquares:
    """Sums of the squared gradients of linears' weights over samples, which come in order."""

    def __init__(self, block: Differentiable, partition_samples: int, device: torch.device, parking: Parking | None):
        """parking: where partial sums wait for their siblings; None: where they are."""
        self._shapes = {name: block.weight(name).shape for name in block.names}
        self._sums = {
            name: Accumulator(COLUMN_SQUARES, shape.numel(), partition_samples, device, parking)
            for name, shape in self._shapes.items()
        }
        self._device = device

    def add(self, sample: int, gradients: Sequence[Tensor]) -> None:
        """Add one sample's gradients, in the order of the linears."""
        for sums, gradient in zip(self._sums.values(), gradients, strict=True):
            sums.add(sample, gradient.flatten())

    def reduced(self, partitions: int, group: Collective) -> Iterator[tuple[str, Tensor | None]]:
        """Yield each linear's sum over all workers, [R, C] float32, on the worker of :func:`roots_of`; collective.

        It is None on the others.
        """
        for name, root in roots_of(list(self._shapes), group).items():
            shape = self._shapes[name]
            total = sum_over_workers((shape.numel(),), self._sums[name].nodes(), partitions, group, root, self._device)
            yield name, None if total is None else total.view(shape)

    def totals(self, partitions: int, group: Collective) -> dict[str, Tensor]:
        """Return the sums over all workers, [R, C] float32 on the CPU, on every worker; collective."""
        found, roots = {}, roots_of(list(self._shapes), group)
        for name, total in self.reduced(partitions, group):
            found[name] = torch.empty(self._shapes[name]) if total is None else total.to("cpu")
            broadcast_tensor_(group, roots[name], found[name])
        return found
