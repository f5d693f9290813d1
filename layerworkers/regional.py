"""What Wanda++ does with a block before it is pruned for good: gradients of its output, and rounds of tuning.

Yang et al., Wanda++: Pruning Large Language Models via Regional Gradients, Findings of ACL 2025 (arXiv 2503.04992).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from billhook.layerworkers.block_facts import Arguments
from billhook.layerworkers.collective import Collective, all_gather
from billhook.layerworkers.gradients import Differentiable, GradientSquares, Samples, Step, descend
from billhook.layerworkers.methods import Rounds, method_named
from billhook.layerworkers.reconstruction import batches
from billhook.layerworkers.scratch import Parking
from billhook.layerworkers.tasks import LinearTask


def regional(linears: Sequence[LinearTask]) -> tuple[list[LinearTask], Rounds]:
    """Return the linears of a block whose method asks for the gradients of its output, and what that asks for."""
    own = [linear for linear in linears if method_named(linear.method).rounds is not None]
    rounds = [method_named(linear.method).rounds for linear in own]
    asked = [each(linear.options) for each, linear in zip(rounds, own, strict=True) if each is not None]
    return own, max(asked, key=lambda each: each.count, default=Rounds(0, 0, 0.0))


def output_gradient_squares(
    block: nn.Module,
    names: Sequence[str],
    samples: Samples,
    arguments: Arguments | None,
    parking: Parking | None,
    group: Collective,
    device: torch.device,
) -> dict[str, Tensor]:
    """Return the mean over samples n of ``(d ||f(X_n)||_2 / dW)^2``, [R, C] float32 on the CPU; collective.

    The square of equation 4's gradient term. block: dense; names: of its linears. The same on every worker.
    """
    differentiable = Differentiable(block, names, arguments)
    squares = GradientSquares(differentiable, samples.partition_samples, device, parking)
    for index, hidden in zip(samples.indices, samples.inputs, strict=True):
        squares.add(index, differentiable.of_weights(hidden, lambda output: output.float().norm()))
    count = sum(all_gather(group, len(samples.indices)))
    return {name: total / count for name, total in squares.totals(samples.partitions, group).items()}


def tuned_once(
    block: nn.Module,
    weights: Mapping[str, Tensor],
    samples: Samples,
    arguments: Arguments | None,
    rounds: Rounds,
    group: Collective,
    device: torch.device,
) -> dict[str, Tensor]:
    """Return linears' weights [R, C] float32 after one pass over the first samples; collective.

    RMSprop on the summed squared error of the block's output (equation 5). What was removed may grow again. block:
    pruned; left as it is. weights: of its linears, by their names in it, float32 on the CPU.
    """
    first = min(samples.partitions, -(-rounds.samples // samples.partition_samples))

    def loss(output: Tensor, position: int) -> Tensor:
        return (output.float() - samples.targets[position].float()).square().sum()

    def begin(weight_RC: Tensor) -> Step:
        optimiser = torch.optim.RMSprop([weight_RC], rounds.rate, foreach=False)

        def step(number: int, gradient_RC: Tensor) -> None:
            weight_RC.grad = gradient_RC
            optimiser.step()
            weight_RC.grad = None

        return step

    return descend(block, weights, samples, arguments, list(batches(first)), loss, begin, group, device)


def tune_in_rounds(
    block: nn.Module,
    weights: Mapping[str, Tensor],
    samples: Samples,
    arguments: Arguments | None,
    rounds: Rounds,
    prune: Callable[[], None],
    put: Callable[[str, Tensor], None],
    group: Collective,
    device: torch.device,
) -> None:
    """Prune a block and tune it, in turns, in place; collective.

    weights: of linears, by their names in the block, float32 on the CPU. prune: prunes them, and the block. put: puts a
    weight into the block, given the name of its linear.
    """
    for _ in range(rounds.count):
        prune()
        for name, weight in tuned_once(block, weights, samples, arguments, rounds, group, device).items():
            weights[name].copy_(weight)
            put(name, weight)
