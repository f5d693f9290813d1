"""How sparse each linear of a block should be, learnt by gradients through the masks that Wanda's scores give.

For each linear there is a distribution over candidate sparsities; an entry is kept with the probability of those
candidates that do not remove it. A forward pass uses the mask of the expected sparsity, gradients pass as if it were
those probabilities. Inputs have passed what was pruned so far, targets the dense model (Xu et al., BESA, ICLR 2024,
arXiv 2402.16880; one distribution for each linear, not for each row).

Legend: R rows (outputs), C columns (inputs), L linears, D candidate sparsities.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableSequence, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from billhook.layerworkers.block_facts import Arguments
from billhook.layerworkers.candidates import LoadedBlock, pruned
from billhook.layerworkers.collective import Collective, all_gather
from billhook.layerworkers.gradients import Differentiable
from billhook.layerworkers.lockstep import run_observed, run_plain
from billhook.layerworkers.observing import InputSquares
from billhook.layerworkers.reconstruction import batches
from billhook.layerworkers.scratch import bands
from billhook.layerworkers.tasks import ModuleTensor
from billhook.layerworkers.water_filling import filled

PERCENTS = range(100, -1, -1)
"""The candidate sparsities."""

STEEPEST = 2000.0
"""Most that the candidates' probabilities are tilted at the start: enough for any sparsity that leaves something."""


@dataclass(frozen=True)
class Learning:
    """What is learnt, and how."""

    sparsity: float
    """Of all linears of a block together; above 0, below 1."""
    epochs: int
    """Passes over the samples."""
    beta: float
    """Weight of ``((s' - s) / s)^2`` beside the block's error, s' being the expected sparsity of the block."""
    rate: float
    """Of Adam."""


@dataclass(frozen=True)
class LearnTask:
    """One block whose linears' sparsities are learnt."""

    index: int
    tensors: tuple[ModuleTensor, ...]
    linears: tuple[tuple[str, str], ...]
    """Names in the block, and on disk, of the linears that count."""
    learning: Learning
    samples: int
    """Over all workers."""
    next_tensors: tuple[ModuleTensor, ...] = ()
    """What will be loaded after this block; read while it is computed."""


@dataclass(frozen=True)
class Masked:
    """A linear whose entries are removed in the order of their scores."""

    dense_RC: Tensor
    """In the compute dtype."""
    order_RC: Tensor
    """int32: the columns of each row, by ascending score; of equal ones the first comes first."""

    @property
    def columns(self) -> int:
        """C."""
        return self.dense_RC.shape[1]

    def write(self, into_RC: Tensor, sparsity: float) -> None:
        """Write the weight without the first ``int(C * sparsity)`` entries of each row."""
        into_RC.copy_(self.dense_RC)
        count = int(self.columns * sparsity)
        for start, stop in bands(self.dense_RC.shape):
            into_RC[start:stop].scatter_(1, self.order_RC[start:stop, :count].long(), 0.0)

    def removal_gradient(self, gradient_RC: Tensor) -> np.ndarray:
        """Return how the loss changes with the probability of each candidate, [D] float64.

        gradient_RC: of the loss, for the masked weight. A candidate c removes the first ``int(C * c)`` entries of each
        row, which are kept the less, the likelier it is: that is minus the sum of ``gradient * dense`` over them.
        """
        by_rank_C = torch.zeros(self.columns, dtype=torch.float64, device=gradient_RC.device)
        for start, stop in bands(gradient_RC.shape):
            product_RC = gradient_RC[start:stop].float() * self.dense_RC[start:stop].float()
            by_rank_C += product_RC.gather(1, self.order_RC[start:stop].long()).sum(dim=0, dtype=torch.float64)
        before = np.concatenate([[0.0], np.cumsum(by_rank_C.cpu().numpy())])
        return -before[[self.columns * percent // 100 for percent in PERCENTS]]


class Shares:
    """The distributions of a block's linears over the candidate sparsities, and what they are learnt by."""

    def __init__(self, sizes: Sequence[int], learning: Learning):
        """sizes: entries of each linear."""
        self._sizes, self._learning = torch.tensor(sizes, dtype=torch.float64), learning
        self._candidates_D = torch.tensor(PERCENTS, dtype=torch.float64) / 100
        self._tilt_D = tilt_for(learning.sparsity) * self._candidates_D
        self.theta_LD = torch.zeros(len(sizes), len(PERCENTS), dtype=torch.float64, requires_grad=True)
        self._optimiser = torch.optim.Adam([self.theta_LD], lr=learning.rate, foreach=False)

    def probabilities(self) -> Tensor:
        """Return the distributions [L, D] float64: ``softmax(sigmoid(theta) + tilt)``."""
        return torch.softmax(torch.sigmoid(self.theta_LD) + self._tilt_D, dim=1)

    def expected(self) -> list[float]:
        """Return the expected sparsity of each linear."""
        return [float(each) for each in self.probabilities().detach() @ self._candidates_D]

    def gradient(self, removal_LD: np.ndarray) -> Tensor:
        """Return the whole loss's gradient for theta, [L, D], given the error's for the probabilities."""
        probabilities_LD = self.probabilities()
        asked = self._learning.sparsity
        mean = self._sizes @ (probabilities_LD @ self._candidates_D) / self._sizes.sum()
        # Linear in the probabilities, so that its gradient is the one that is given.
        error = (probabilities_LD * torch.from_numpy(removal_LD)).sum()
        loss = error + self._learning.beta * ((mean - asked) / asked).square()
        return torch.autograd.grad(loss, self.theta_LD)[0]

    def step(self, removal_LD: np.ndarray) -> None:
        """Make one step of Adam, given the error's gradient for the probabilities."""
        self.theta_LD.grad = self.gradient(removal_LD)
        self._optimiser.step()


def tilt_for(sparsity: float) -> float:
    """Return the number b for which candidates c of probabilities that go with ``exp(b c)`` have this mean.

    It is 0 at 50 %, which is where the paper's distributions start; they cannot get far from it, since the logarithms
    of their probabilities differ by 1 at most.
    """
    candidates_D = np.array(PERCENTS) / 100
    low, high = -STEEPEST, STEEPEST
    for _ in range(100):
        middle = (low + high) / 2
        weights_D = np.exp(middle * candidates_D - max(0.0, middle))
        if weights_D @ candidates_D < sparsity * weights_D.sum():
            low = middle
        else:
            high = middle
    return high


def channel_error(output: Tensor, target: Tensor) -> Tensor:
    """Return the mean over channels of ``|f_h - y_h|^2 / |y_h|^2``, of an output f and a target y, [1, T, H].

    The norms are over the tokens of the sample, as the authors' code has it by default.
    """
    energy_H = target.square().sum(dim=(0, 1)).clamp(min=torch.finfo(target.dtype).tiny)
    return ((output - target).square().sum(dim=(0, 1)) / energy_H).mean()


@torch.inference_mode()
def learn_block(
    block: LoadedBlock,
    states: MutableSequence[Tensor],
    dense: MutableSequence[Tensor],
    learning: Learning,
    samples: Sequence[int],
    partitions: int,
    device: torch.device,
    group: Collective,
) -> list[float]:
    """Learn how sparse a block's linears should be, and carry the samples through it pruned so.

    Returns the sparsity of each linear, in the order of ``block.disk_names``; their mean over all entries is what is
    asked. Where the block's error is not smaller with them, on all samples, all linears have the same. The same on
    every worker, whatever number of them there is; collective over ``group``.

    states: of the samples after what was pruned so far, [1, T, H]; replaced by those after this block pruned. dense: of
    the same in the dense model; replaced by those after this block. samples: indices of this worker's, each a partition
    of its own. partitions: samples over all workers.
    """
    names = list(block.disk_names.values())
    run_plain(block.module, dense, block.arguments)
    if not names:
        run_plain(block.module, states, block.arguments)
        return []
    squares = InputSquares(block.module, block.groups, block.disk_names, samples, 1, device)
    run_observed(block.module, squares.groups, states, block.arguments, squares.add)
    norms = squares.norms(partitions, group)
    sizes = [block.weights[name].numel() for name in names]
    learnt = learnt_shares(block, norms, states, dense, learning, samples, partitions, device, group)
    most = [size - 1 for size in sizes]
    counts = filled(learnt, sizes, most, learning.sparsity * sum(sizes))
    found = [float(count) / size for count, size in zip(counts, sizes, strict=True)]
    even = [learning.sparsity] * len(names)

    def put(shares: Sequence[float]) -> None:
        for name, share in zip(names, shares, strict=True):
            block.put(name, pruned(block.weights[name], norms[name], share))

    def error_with(shares: Sequence[float]) -> float:
        put(shares)
        return _mean_error(block.module, states, dense, block.arguments, group)

    before = error_with(even)
    if not error_with(found) < before:  # nor where it is not a number
        found = even
        put(found)
    run_plain(block.module, states, block.arguments)
    return found


def learnt_shares(
    block: LoadedBlock,
    norms: Mapping[str, Tensor],
    inputs: MutableSequence[Tensor],
    targets: Sequence[Tensor],
    learning: Learning,
    samples: Sequence[int],
    partitions: int,
    device: torch.device,
    group: Collective,
) -> list[float]:
    """Return the expected sparsity of each linear after learning; their mean is near what is asked, not equal to it.

    norms: 2-norms [C] of the linears' input channels, by name on disk. inputs: of the block, after what was pruned so
    far; targets: what the dense model's block makes of the same samples, each [1, T, H]. The paper's optimiser is
    Prodigy; this is Adam (Kingma & Ba, ICLR 2015).
    """
    names = list(block.disk_names)
    with torch.inference_mode(False), torch.enable_grad():
        copies = Differentiable(block.module, names, block.arguments)
        dense = dict(block.module.named_parameters())
        linears = {
            name: Masked(
                dense[f"{name}.weight"].detach(), score_order(block.weights[disk_name], norms[disk_name], device)
            )
            for name, disk_name in block.disk_names.items()
        }
        shares = Shares([linear.dense_RC.numel() for linear in linears.values()], learning)
        for batch in list(batches(partitions)) * learning.epochs:
            for (name, linear), share in zip(linears.items(), shares.expected(), strict=True):
                linear.write(copies.weight(name), share)
            own: dict[int, np.ndarray] = {}
            for position, index in enumerate(samples):
                if index not in batch:
                    continue
                target = targets[position].float()
                scale = target.shape[-2]  # so that nothing is too small for the gradients of 16 bits

                def loss(output: Tensor, target: Tensor = target, scale: int = scale) -> Tensor:
                    return scale * channel_error(output.float(), target)

                found = copies.of_weights(inputs[position], loss)
                gradients = [
                    linear.removal_gradient(each) for linear, each in zip(linears.values(), found, strict=True)
                ]
                own[index] = np.stack(gradients) / scale
            everyone = {index: each for of_rank in all_gather(group, own) for index, each in of_rank.items()}
            shares.step(np.sum([everyone[index] for index in batch], axis=0) / len(batch))
        return shares.expected()


def score_order(weight_RC: Tensor, norms_C: Tensor, device: torch.device) -> Tensor:
    """Return the columns of each row by ascending Wanda score, [R, C] int32; of equal ones the first comes first."""
    order_RC = torch.empty(weight_RC.shape, dtype=torch.int32, device=device)
    for start, stop in bands(weight_RC.shape):
        score_RC = weight_RC[start:stop].to(device, torch.float32).abs() * norms_C
        order_RC[start:stop] = torch.sort(score_RC, dim=1, stable=True).indices
    return order_RC


def _mean_error(
    block: nn.Module,
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    arguments: Arguments | None,
    group: Collective,
) -> float:
    """Return the mean of :func:`channel_error` over the samples of all workers."""
    own = []
    for given, target in zip(inputs, targets, strict=True):
        output = [given.clone()]
        run_plain(block, output, arguments)
        own.append(float(channel_error(output[0].double(), target.double())))
    everyone = [error for of_rank in all_gather(group, own) for error in of_rank]
    return math.fsum(everyone) / len(everyone)
