"""Where the rows of linears show."""

from __future__ import annotations

import numpy as np
import pytest

from billhook.layerworkers.block_facts import InputGroup
from billhook.orchestrator.allocation.outlets import Outlet, outlets_of
from billhook.orchestrator.layout import Linear


def shown(shapes: dict[str, tuple[int, int, int]], groups: list[InputGroup], heads: int = 8, key_heads: int = 8) -> str:
    """Each linear and where it shows, given its shape and the number of its input."""
    linears = [Linear(name, name, (rows, columns), group, 2) for name, (rows, columns, group) in shapes.items()]
    found = outlets_of(linears, groups, heads, key_heads)
    return " ".join(f"{one.name}>{to.name if to else ''}" for one, to in zip(linears, found, strict=True))


def inputs(count: int) -> list[InputGroup]:
    return [InputGroup(str(number), ()) for number in range(count)]


LLAMA = {"q": (64, 64, 0), "k": (16, 64, 0), "v": (16, 64, 0), "o": (64, 64, 1), "g": (96, 64, 2), "u": (96, 64, 2)}


def test_of_a_llama_each_input_shows_what_the_linears_before_it_give() -> None:
    shapes = {**LLAMA, "d": (64, 96, 3)}
    assert shown(shapes, inputs(4), 8, 2) == "q>o k>o v>o o>g g>d u>d d>"
    assert shown(shapes, inputs(4), 8, 4) == "q>o k> v> o>g g>d u>d d>", "of other shapes it is not known"


def test_what_is_not_pruned_shows_nothing() -> None:
    assert shown({"k": (16, 64, 0), "g": (96, 64, 2), "d": (64, 96, 3)}, inputs(4), 8, 2) == "k>g g>d d>"
    assert shown({"q": (64, 64, 0), "d": (64, 96, 3)}, inputs(4)) == "q> d>"


def test_fused_and_parallel_linears_show_where_the_sizes_say_so() -> None:
    fused = {"qkv": (192, 64, 0), "o": (64, 64, 1), "up": (256, 64, 2), "down": (64, 256, 3)}
    assert shown(fused, inputs(4)) == "qkv> o>up up>down down>"
    parallel = {"q": (64, 64, 0), "up": (256, 64, 0), "o": (64, 64, 1), "down": (64, 256, 2)}
    assert shown(parallel, inputs(3)) == "q>o up>down o> down>"


def test_experts_show_within_themselves() -> None:
    groups = [
        *inputs(2),
        InputGroup("e0", (), "experts", number=0),
        InputGroup("e1", (), "experts", number=1),
        InputGroup("e0", (), "experts", second=True, number=0),
        InputGroup("e1", (), "experts", second=True, number=1),
        InputGroup("shared", ()),
    ]
    experts = {"u0": (96, 64, 2), "u1": (96, 64, 3), "d0": (64, 96, 4), "d1": (64, 96, 5)}
    attention = {"q": (64, 64, 0), "o": (64, 64, 1)}
    assert shown({**attention, **experts}, groups) == "q>o o> u0>d0 u1>d1 d0> d1>"
    assert shown({**attention, **experts, "s": (64, 64, 6)}, groups) == "q>o o>s u0>d0 u1>d1 d0> d1> s>"


def test_keys_and_values_take_the_mean_over_the_heads_that_they_are_for() -> None:
    of_channels = np.arange(12, dtype=np.float32)  # six heads of two channels, three for each of two
    assert Outlet("o", 2).rows(of_channels, 4).tolist() == [2.0, 3.0, 8.0, 9.0]
    assert Outlet("o").rows(of_channels, 12) == pytest.approx(of_channels)
