"""Which linears are a feed-forward network, and what happens between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from billhook.layerworkers.block_facts import run_on_meta
from billhook.layerworkers.feed_forward import FeedForward

WIDTH, BETWEEN = 6, 10


class Plain(nn.Module):
    """A block that is a feed-forward network of two linears."""

    def __init__(self, between: Callable[[Tensor], Tensor]):
        super().__init__()
        self.one, self.last = nn.Linear(WIDTH, BETWEEN), nn.Linear(BETWEEN, WIDTH)
        self.between = between

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.last(self.between(self.one(hidden)))


class Gated(nn.Module):
    """A block that is a feed-forward network of three."""

    def __init__(self, between: Callable[[Tensor, Tensor], Tensor]):
        super().__init__()
        self.one, self.other = nn.Linear(WIDTH, BETWEEN), nn.Linear(WIDTH, BETWEEN)
        self.last = nn.Linear(BETWEEN, WIDTH)
        self.between = between

    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden * 2.0
        return hidden + self.last(self.between(self.one(x), self.other(x)))


def found(block: nn.Module) -> FeedForward | None:
    return run_on_meta(block.to("meta"), torch.zeros(1, 5, WIDTH), ((), {})).feed_forward


def new_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(0.8 * (x + 0.04 * torch.pow(x, 3.0))))


@pytest.mark.parametrize("function", [torch.relu, functional.silu, new_gelu, lambda x: functional.relu(x).square()])
def test_what_is_between_two_is_done_again(function: Callable[[Tensor], Tensor]) -> None:
    network = found(Plain(function))
    assert network is not None
    assert (network.gate, network.up, network.down) == ("", "one", "last")
    assert network.between.is_relu is (function is torch.relu)
    x = torch.randn(3, 4)
    assert torch.equal(network.activation(x), function(x))


@pytest.mark.parametrize(
    ("function", "gate", "up"),
    [
        (lambda a, b: functional.silu(a) * b, "one", "other"),
        (lambda a, b: a * functional.gelu(b, approximate="tanh"), "other", "one"),
        (lambda a, b: a * b, "one", "other"),
    ],
)
def test_a_gate_is_told_from_what_it_gates(function: Callable[[Tensor, Tensor], Tensor], gate: str, up: str) -> None:
    network = found(Gated(function))
    assert network is not None
    assert (network.gate, network.up, network.down) == (gate, up, "last")
    a, b = torch.randn(2, 3, 4)
    made = {"one": a, "other": b}
    torch.testing.assert_close(network.activation(made[gate]) * made[up], function(a, b))


@pytest.mark.parametrize(
    "block",
    [
        Plain(lambda x: x.softmax(dim=-1)),
        Plain(lambda x: x),
        Plain(torch.relu_),
        Plain(lambda x: x.flip(-1).relu()),
        Gated(lambda a, b: functional.silu(a) + b),
        Gated(lambda a, b: functional.silu(a) * b.square()),
        Gated(lambda a, b: functional.silu(a) * b.cumsum(dim=-1)),
    ],
)
def test_other_forms_are_not_taken_for_one(block: nn.Module) -> None:
    assert found(block) is None


def test_neither_are_two_in_one_block() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Plain(torch.relu), Plain(torch.relu)

        def forward(self, hidden: Tensor) -> Any:
            return self.second(self.first(hidden))

    assert found(Both()) is None


def test_gradients_go_through_it() -> None:
    network = found(Gated(lambda a, b: functional.silu(a) * b))
    assert network is not None
    x = torch.linspace(-3, 3, 7, requires_grad=True)
    (slope,) = torch.autograd.grad(network.activation(x).sum(), x)
    torch.testing.assert_close(slope, torch.sigmoid(x) * (1 + x * (1 - torch.sigmoid(x))))
