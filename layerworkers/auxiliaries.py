"""SparseLLM's alternation: what flows through a block's feed-forward network may deviate, and its linears follow.

Bai et al., SparseLLM: Towards Global Pruning of Pre-trained Language Models, NeurIPS 2024 (arXiv 2402.17946).

Legend: T tokens of a sample, I channels between linears, R rows and C columns of a linear, O channels of the output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableSequence, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from billhook.layerworkers.feed_forward import FeedForward
from billhook.layerworkers.methods import Alternation, method_named
from billhook.layerworkers.reduction import Node
from billhook.layerworkers.scratch import Parking
from billhook.layerworkers.statistics import Accumulator, Statistic, with_deviations
from billhook.layerworkers.tasks import LinearTask

STEPS = 2
"""Steps that an auxiliary takes where there is no closed form: as many as the authors' code passes over them."""

Refit = Callable[[str, Statistic, list[Node]], None]
"""Fits a linear, by its name in the block, to this worker's sums and those of all others, and prunes it."""


def alternated(linears: Sequence[LinearTask], network: FeedForward | None) -> tuple[list[LinearTask], Alternation]:
    """Return the linears of a network whose method alternates between them, in its order, and how; none: no epochs."""
    names = network.linears if network is not None else ()
    by_name = {each.name: each for each in linears if method_named(each.method).alternation is not None}
    own = [by_name[name] for name in names if name in by_name]
    asked = method_named(own[0].method).alternation if own else None
    how = Alternation(0) if asked is None else asked(own[0].options)
    return (own, how) if how.epochs else ([], how)


@dataclass(frozen=True)
class Network:
    """A block's feed-forward network as it was and as it is, by the names of its linears in the block."""

    form: FeedForward
    dense: Mapping[str, Tensor]
    """[R, C], on the CPU."""
    sparse: Mapping[str, Tensor]
    """[R, C], on the CPU; they change from epoch to epoch."""
    biases: Mapping[str, Tensor | None]


def network_of(
    block: nn.Module, form: FeedForward, dense: Mapping[str, Tensor], sparse: Mapping[str, Tensor]
) -> Network:
    """Return the network with the biases that its linears have in the block."""
    biases: dict[str, Tensor | None] = {}
    for name in form.linears:
        bias = getattr(block.get_submodule(name), "bias", None)
        biases[name] = bias if isinstance(bias, Tensor) else None
    return Network(form, dense, sparse, biases)


@dataclass(frozen=True)
class Auxiliaries:
    """What one worker's samples have between the linears, free to deviate from what these make; in the compute dtype.

    What enters the last linear is an auxiliary, too, but follows from these.
    """

    inputs: MutableSequence[Tensor]
    """Of the network, [..., C]."""
    targets: MutableSequence[Tensor]
    """What the dense network makes of them, [T, O]."""
    up: MutableSequence[Tensor]
    """[T, I]."""
    gate: MutableSequence[Tensor]
    """[T, I]; nothing where there is no gate."""

    def forget(self) -> None:
        """Give up all of them: those that are parked give their places back."""
        for each in (self.inputs, self.targets, self.up, self.gate):
            del each[:]


def alternate(
    network: Network,
    auxiliaries: Auxiliaries,
    samples: Sequence[int],
    partition_samples: int,
    how: Alternation,
    refit: Refit,
    device: torch.device,
    parking: Parking | None,
) -> None:
    """Move the auxiliaries and refit the linears to them, in turns; collective.

    What is made smaller is ``alpha |up(x) - z|^2 + alpha |gate(x) - s|^2 + gamma |p - between(s, z)|^2 + beta
    |down(p) - y|^2``, summed over tokens: by p, z and s in turn, token by token, then by the linears, whose sums go
    over all workers.

    auxiliaries: with the inputs only; the others are added. samples: the indices of this worker's. parking: where
    partial sums wait for their siblings; None: where they are.
    """
    form = network.form
    dense = _Linears(network, network.dense, device)
    for given in auxiliaries.inputs:
        _begin(form, dense, given, auxiliaries)
    for _ in range(how.epochs):
        sparse = _Linears(network, network.sparse, device)
        towards_output = output_inverse(sparse.weights[form.down], how)
        statistics = {name: with_deviations(len(weight)) for name, weight in network.dense.items()}
        sums = {
            name: Accumulator(statistic, network.dense[name].shape[1], partition_samples, device, parking)
            for name, statistic in statistics.items()
        }
        for position, sample in enumerate(samples):
            for name, x_TC, aim_TR in _moved(form, sparse, towards_output, position, auxiliaries, how):
                sums[name].add(sample, x_TC, aim_TR - dense(name, x_TC))
        del sparse, towards_output
        for name in form.linears:
            refit(name, statistics[name], sums.pop(name).nodes())


class _Linears:
    """Linears in float32, on the device."""

    def __init__(self, network: Network, weights: Mapping[str, Tensor], device: torch.device):
        self.weights = {name: weight.to(device, torch.float32) for name, weight in weights.items()}
        self.biases = {name: None if bias is None else bias.float() for name, bias in network.biases.items()}

    def __call__(self, name: str, x_TC: Tensor) -> Tensor:
        return functional.linear(x_TC, self.weights[name], self.biases[name])


def _begin(form: FeedForward, dense: _Linears, given: Tensor, auxiliaries: Auxiliaries) -> None:
    """Add what the dense network has between its linears, and makes, of one sample."""
    x_TC = given.float().flatten(0, -2)
    made = [dense(name, x_TC) for name in form.linears[:-1]]
    auxiliaries.targets.append(dense(form.down, form.between(*made)).to(given.dtype))
    auxiliaries.up.append(made[-1].to(given.dtype))
    if form.gate:
        auxiliaries.gate.append(made[0].to(given.dtype))


def _moved(
    form: FeedForward,
    sparse: _Linears,
    towards_output: Tensor,
    position: int,
    auxiliaries: Auxiliaries,
    how: Alternation,
) -> list[tuple[str, Tensor, Tensor]]:
    """Move one sample's auxiliaries; return each linear's name, what it is given, and what it is to make of that."""
    given = auxiliaries.inputs[position]
    x_TC, target_TO = given.float().flatten(0, -2), auxiliaries.targets[position].float()
    up_TI = auxiliaries.up[position].float()
    gate_TI = auxiliaries.gate[position].float() if form.gate else None
    bias_O = sparse.biases[form.down]
    hidden_TI, up_TI, gate_TI = moved(
        form,
        sparse.weights[form.down],
        towards_output,
        target_TO if bias_O is None else target_TO - bias_O,
        sparse(form.up, x_TC),
        sparse(form.gate, x_TC) if form.gate else None,
        up_TI,
        gate_TI,
        how,
    )
    auxiliaries.up[position] = up_TI.to(given.dtype)
    found = [(form.up, x_TC, up_TI), (form.down, hidden_TI, target_TO)]
    if gate_TI is not None:
        auxiliaries.gate[position] = gate_TI.to(given.dtype)
        found.append((form.gate, x_TC, gate_TI))
    return found


def output_inverse(down_OI: Tensor, how: Alternation) -> Tensor:
    """Return ``(W W^T + gamma / beta I)^-1``, [O, O] float32, of the last linear's weight: see :func:`moved`."""
    matrix_OO = (down_OI @ down_OI.T).double()
    matrix_OO.diagonal().add_(how.gamma / how.beta)
    return torch.cholesky_inverse(torch.linalg.cholesky(matrix_OO)).float()


def moved(
    form: FeedForward,
    down_OI: Tensor,
    towards_output: Tensor,
    target_TO: Tensor,
    up_output_TI: Tensor,
    gate_output_TI: Tensor | None,
    up_TI: Tensor,
    gate_TI: Tensor | None,
    how: Alternation,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return p, z and s after each of them, in this order, has made the objective smaller.

    The objective's best p is ``(beta W^T W + gamma I)^-1 (beta W^T y + gamma between(s, z))``: which is
    ``between(s, z)`` and ``W^T (W W^T + gamma / beta I)^-1`` times what the output then still lacks.

    target_TO: without the bias. up_output_TI, gate_output_TI: what the linears make.
    """
    hidden_TI = form.activation(up_TI) if gate_TI is None else form.activation(gate_TI) * up_TI
    hidden_TI = hidden_TI + (target_TO - hidden_TI @ down_OI.T) @ towards_output @ down_OI
    if gate_TI is not None and gate_output_TI is not None:
        factor_TI = form.activation(gate_TI)
        up_TI = how.alpha * up_output_TI + how.gamma * factor_TI * hidden_TI
        up_TI /= how.alpha + how.gamma * factor_TI.square()
        gate_TI = stepped(gate_TI, gate_output_TI, hidden_TI, form.activation, up_TI, how)
    elif form.between.is_relu:
        up_TI = before_relu(up_output_TI, hidden_TI, how)
    else:
        up_TI = stepped(up_TI, up_output_TI, hidden_TI, form.activation, torch.ones_like(up_TI), how)
    return hidden_TI, up_TI, gate_TI


def before_relu(output: Tensor, hidden: Tensor, how: Alternation) -> Tensor:
    """Return the z that has the least ``alpha (z - output)^2 + gamma (hidden - relu(z))^2``, entry by entry.

    It is the best of those not below 0 or the best of those not above.
    """
    above = ((how.alpha * output + how.gamma * hidden) / (how.alpha + how.gamma)).clamp_(min=0)
    below = output.clamp(max=0)
    errors = [how.alpha * (z - output).square() + how.gamma * (hidden - z.relu()).square() for z in (above, below)]
    return torch.where(errors[0] <= errors[1], above, below)


def stepped(
    start: Tensor,
    output: Tensor,
    hidden: Tensor,
    activation: Callable[[Tensor], Tensor],
    factor: Tensor,
    how: Alternation,
) -> Tensor:
    """Return a z with ``alpha (z - output)^2 + gamma (hidden - factor activation(z))^2`` not above that of ``start``.

    A few Gauss-Newton steps, each entry's own: where one, or a quarter of it, does not make it smaller, it stays.
    """

    def errors_at(z: Tensor) -> Tensor:
        return how.alpha * (z - output).square() + how.gamma * (hidden - factor * activation(z)).square()

    least = errors_at(start)
    for _ in range(STEPS):
        with torch.inference_mode(False), torch.enable_grad():
            leaf = start.clone().requires_grad_()
            made = activation(leaf)
            (slope,) = torch.autograd.grad(made.sum(), leaf)
        slope = factor * slope
        gradient = how.alpha * (start - output) - how.gamma * slope * (hidden - factor * made.detach())
        step = gradient / (how.alpha + how.gamma * slope.square())
        for there in (start - step, start - step / 4):
            errors = errors_at(there)
            start = torch.where(errors < least, there, start)
            least = torch.fmin(errors, least)
    return start
