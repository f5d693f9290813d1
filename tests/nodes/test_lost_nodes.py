"""Nodes lose their power, workers freeze and nodes join, in the middle of a run: the same bytes."""

from __future__ import annotations

from typing import Any

import pytest

Lab = Any

PHASES = {
    "forward": ("Accumulator.add", 50),
    "reduce": ("_reduce", 6),
    "solve": ("_solve_share", 10),
    "gather": ("_gather_", 10),
    "write": ("BlockWriter.write", 7),
}
"""What a worker calls in each phase, and which call: one of the second block's, however the two share their work."""


@pytest.mark.parametrize("phase", PHASES)
def test_a_node_loses_its_power(lab: Lab, expected: dict[str, bytes], phase: str) -> None:
    point, count = PHASES[phase]
    output = lab.disk / f"lost-in-{phase}"
    done = lab.disturbed(output, ("worker", point, count, "freeze"), lab.power_off)
    assert done.code == 0, done.err
    assert lab.contents(output) == expected


def test_a_worker_freezes(lab: Lab, expected: dict[str, bytes]) -> None:
    output = lab.disk / "frozen"
    done = lab.disturbed(output, ("worker", "_solve_share", 10, "freeze"), lambda node: None)
    assert done.code == 0, done.err
    assert lab.contents(output) == expected


def test_a_node_that_joins_is_used(lab: Lab, expected: dict[str, bytes]) -> None:
    lab.power_off("two")
    output = lab.disk / "joined"
    done = lab.disturbed(output, ("driver", "append", 3, "wait"), lambda node: lab.start("two"))
    assert done.code == 0, done.err
    assert lab.contents(output) == expected
