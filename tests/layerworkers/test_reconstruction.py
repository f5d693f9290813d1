"""Tuning what a sparse block keeps."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from billhook.layerworkers.collective import Alone, Collective, Counted
from billhook.layerworkers.gradients import Differentiable, Samples, summed_gradients
from billhook.layerworkers.lockstep import run_plain
from billhook.layerworkers.reconstruction import batches, output_error, reconstruct, relative_error
from billhook.layerworkers.reduction import even_ranges, total
from billhook.layerworkers.stopwatch import Stopwatch
from billhook.layerworkers.tasks import Tuning
from billhook.layerworkers.traffic import Matrix, tuning_traffic

SAMPLES, TOKENS, WIDTH = 12, 5, 8
CPU = torch.device("cpu")


class Block(nn.Module):
    """Attention and a gated MLP, in small."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.scale = nn.LayerNorm(WIDTH), nn.Parameter(torch.ones(WIDTH))
        self.qkv, self.o = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, 20, bias=False), nn.Linear(20, WIDTH, bias=False)

    def forward(self, hidden: Tensor, shift: Tensor) -> tuple[Tensor]:
        q, k, v = self.qkv(self.norm(hidden) + shift).unsqueeze(1).chunk(3, dim=-1)
        hidden = hidden + self.o(functional.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1))
        return (hidden + self.down(functional.silu(self.up(hidden * self.scale))),)


NAMES = ("qkv", "o", "up", "down")


def setting() -> tuple[Block, dict[str, Tensor], list[Tensor], list[Tensor], Any]:
    """Return a sparse block, its linears' weights, inputs, targets of the dense block, and arguments."""
    torch.manual_seed(0)
    block = Block().requires_grad_(False)
    inputs = [torch.randn(1, TOKENS, WIDTH) for _ in range(SAMPLES)]
    arguments = ((torch.randn(1, TOKENS, WIDTH),), {})
    targets = [each.clone() for each in inputs]
    run_plain(block, targets, arguments)
    weights = {}
    for name in NAMES:
        weight = block.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        weight[torch.rand(weight.shape) < 0.6] = 0.0
        weights[name] = weight.clone()
    return block, weights, inputs, targets, arguments


def tuned(given: Any, group: Collective, tuning: Tuning) -> dict[str, Tensor]:
    block, weights, inputs, targets, arguments = deepcopy(given)
    first, last = (2 * each for each in even_ranges(SAMPLES // 2, group.size)[group.rank])
    own = Samples(range(first, last), inputs[first:last], targets[first:last], 2, SAMPLES // 2)
    return reconstruct(block, weights, own, arguments, tuning, group, CPU)


def test_gradients_are_those_of_the_summed_error() -> None:
    block, weights, inputs, targets, arguments = setting()
    samples = Samples(range(SAMPLES), inputs, targets, 2, SAMPLES // 2)
    differentiable = Differentiable(block, NAMES, arguments)

    def loss(output: Tensor, position: int) -> Tensor:
        return TOKENS * relative_error(output, targets[position])

    nodes = summed_gradients(differentiable, samples, [1, 4], loss)
    found = {name: total(each, 2).view(weights[name].shape) for name, each in nodes.items()}
    block.requires_grad_(True)
    error = sum(
        ((block(inputs[n], *arguments[0])[0] - targets[n]).norm(dim=-1) / targets[n].norm(dim=-1)).square().sum()
        for n in (2, 3, 8, 9)
    )
    assert isinstance(error, Tensor)
    error.backward()
    for name in NAMES:
        expected = block.get_submodule(name).weight.grad
        assert isinstance(expected, Tensor)
        torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("partitions", [1, 2, 7, 8])
def test_every_partition_is_in_one_batch(partitions: int) -> None:
    found = list(batches(partitions))
    assert sorted(each for batch in found for each in batch) == list(range(partitions))
    assert all(batch == sorted(batch) for batch in found)


def test_tuning_lowers_the_error_and_leaves_zeros_alone() -> None:
    block, weights, inputs, targets, arguments = setting()

    def error_with(values: dict[str, Tensor]) -> float:
        for name, value in values.items():
            block.get_submodule(name).weight = nn.Parameter(value, requires_grad=False)
        outputs = [each.clone() for each in inputs]
        run_plain(block, outputs, arguments)
        return output_error(outputs, targets, Alone())

    before = error_with(weights)
    found = tuned(setting(), Alone(), Tuning(20, 0.05))
    assert error_with(found) < 0.6 * before
    for name in NAMES:
        assert torch.equal(found[name] == 0, weights[name] == 0)
        assert not torch.equal(found[name], weights[name])


@pytest.mark.parametrize("workers", [2, 3, 4])
def test_no_more_is_moved_than_is_predicted(workers: int, run_group: Any) -> None:
    given, tuning = setting(), Tuning(2, 0.05)

    def moved(group: Collective) -> int:
        counts: list[int] = []
        tuned(given, Counted(group, counts.append, Stopwatch()), tuning)
        return sum(counts)

    measured = sum(run_group(workers, moved))
    matrices = [Matrix(weight.shape[0], weight.shape[1], 4) for weight in given[1].values()]
    predicted = tuning_traffic(matrices, 2 * len(list(batches(SAMPLES // 2))), 4, workers).moved_bytes
    assert 0.6 * predicted <= measured <= predicted


@pytest.mark.parametrize("workers", [2, 3])
def test_no_bit_depends_on_the_number_of_workers(workers: int, run_group: Any) -> None:
    given, tuning = setting(), Tuning(2, 0.05)
    (alone,) = run_group(1, lambda group: tuned(given, group, tuning))  # with as many threads as the others
    for found in run_group(workers, lambda group: tuned(given, group, tuning)):
        assert all(torch.equal(found[name], alone[name]) for name in NAMES)
