"""Gradients of a block's output, and rounds of pruning and tuning."""

from __future__ import annotations

import threading
from copy import deepcopy
from fractions import Fraction
from typing import Any

import pytest
import torch
from solved_alone import solved
from torch import Tensor, nn
from torch.nn import functional

from billhook.layerworkers.collective import Alone, Collective
from billhook.layerworkers.errors import OptionError
from billhook.layerworkers.gradients import Samples
from billhook.layerworkers.lockstep import run_plain
from billhook.layerworkers.methods import METHODS, Rounds, method_named
from billhook.layerworkers.patterns import NM, Unstructured
from billhook.layerworkers.reduction import even_ranges
from billhook.layerworkers.regional import output_gradient_squares, tune_in_rounds, tuned_once

SAMPLES, TOKENS, WIDTH = 6, 5, 8
CPU = torch.device("cpu")
NAMES = ("up", "down")
_DRAWING = threading.Lock()
"""Torch's generator is one of all threads."""


class Block(nn.Module):
    """A gated MLP, in small."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 20, bias=False), nn.Linear(20, WIDTH, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.down(functional.silu(self.up(hidden)))


def setting() -> tuple[Block, list[Tensor]]:
    with _DRAWING:
        torch.manual_seed(0)
        return Block().requires_grad_(False), [torch.randn(1, TOKENS, WIDTH) for _ in range(SAMPLES)]


def share(group: Collective, inputs: list[Tensor], targets: list[Tensor]) -> Samples:
    first, last = even_ranges(SAMPLES, group.size)[group.rank]
    return Samples(range(first, last), inputs[first:last], targets[first:last], 1, SAMPLES)


def squares_of(group: Collective) -> dict[str, Tensor]:
    block, inputs = setting()
    return output_gradient_squares(block, NAMES, share(group, inputs, inputs), ((), {}), None, group, CPU)


def test_squares_are_those_of_autograd() -> None:
    found = squares_of(Alone())
    block, inputs = setting()
    block.requires_grad_(True)
    expected = {name: torch.zeros_like(found[name]) for name in NAMES}
    for hidden in inputs:
        block.zero_grad()
        block(hidden).norm().backward()
        for name in NAMES:
            expected[name] += block.get_submodule(name).weight.grad.square() / SAMPLES  # type: ignore[operator,union-attr]
    for name in NAMES:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-9)


def tuned(group: Collective, rounds: Rounds) -> dict[str, Tensor]:
    block, inputs = setting()
    targets = [each.clone() for each in inputs]
    run_plain(block, targets, ((), {}))
    weights = {name: block.get_submodule(name).weight.clone() for name in NAMES}  # type: ignore[operator]

    def put(name: str, weight: Tensor) -> None:
        block.get_submodule(name).weight = nn.Parameter(weight.clone(), requires_grad=False)

    def prune() -> None:
        for name, weight in weights.items():
            weight[weight.abs() < weight.abs().median()] = 0.0
            put(name, weight)

    samples = share(group, inputs, targets)
    tune_in_rounds(block, weights, samples, ((), {}), rounds, prune, put, group, CPU)
    return weights


@pytest.mark.parametrize("workers", [2, 3])
def test_no_bit_depends_on_the_number_of_workers(workers: int, run_group: Any) -> None:
    def work(group: Collective) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return squares_of(group), tuned(group, Rounds(2, 4, 1e-3))

    (alone,) = run_group(1, work)
    for found in run_group(workers, work):
        for mine, theirs in zip(found, alone, strict=True):
            assert all(torch.equal(mine[name], theirs[name]) for name in NAMES)


def test_tuning_lowers_the_error_and_lets_what_was_removed_grow() -> None:
    block, inputs = setting()
    targets = [each.clone() for each in inputs]
    run_plain(block, targets, ((), {}))
    sparse = deepcopy(block)
    weights = {}
    for name in NAMES:
        weight = sparse.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        weight[weight.abs() < weight.abs().median()] = 0.0
        weights[name] = weight.clone()

    def error(values: dict[str, Tensor]) -> float:
        for name, value in values.items():
            sparse.get_submodule(name).weight = nn.Parameter(value, requires_grad=False)
        outputs = [each.clone() for each in inputs]
        run_plain(sparse, outputs, ((), {}))
        return sum(float((one - other).square().sum()) for one, other in zip(outputs, targets, strict=True))

    samples, before = share(Alone(), inputs, targets), error(weights)
    found = tuned_once(sparse, weights, samples, ((), {}), Rounds(1, SAMPLES, 1e-3), Alone(), CPU)
    assert error(found) < before
    assert all(torch.count_nonzero(found[name]) > torch.count_nonzero(weights[name]) for name in NAMES)
    still = tuned_once(sparse, weights, samples, ((), {}), Rounds(1, SAMPLES, 0.0), Alone(), CPU)
    assert all(torch.equal(still[name], weights[name]) for name in NAMES)


@pytest.mark.parametrize("pattern", [Unstructured(Fraction(1, 2)), NM(2, 4)])
def test_without_gradients_it_is_wanda(pattern: Any) -> None:
    gradients = torch.rand(24, 32)
    wanda = solved("wanda", {}, gradients, pattern)
    assert torch.equal(solved("wanda++", {"alpha": 0.0}, gradients, pattern), wanda)
    assert not torch.equal(solved("wanda++", {}, gradients, pattern), wanda)


def test_what_has_a_large_gradient_stays() -> None:
    gradients = torch.zeros(24, 32)
    gradients[:, 5] = 1e6
    assert solved("wanda++", {}, gradients, Unstructured(Fraction(9, 10)))[:, 5].count_nonzero() == 24


def test_a_name_may_end_in_plus_signs() -> None:
    assert method_named("wanda++").name == "wanda++"
    chained = method_named("wanda+++dsnot")
    assert chained.name == "wanda+++dsnot"
    assert chained.rounds is not None
    assert chained.rounds(chained.options(rounds=3)) == Rounds(3, 32, 3e-7)
    with pytest.raises(OptionError, match="cannot follow"):
        method_named("wanda+")


@pytest.mark.parametrize("options", [{"alpha": -1.0}, {"rounds": -1}, {"round_samples": 0}, {"rate": 1.5}])
def test_options_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(options))):
        METHODS["wanda++"].options(**options)
