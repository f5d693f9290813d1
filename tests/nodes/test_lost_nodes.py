"""Nodes lose their power, workers freeze and nodes join, in the middle of a run: the same bytes."""

from __future__ import annotations

import json
from typing import Any

import pytest

Lab = Any

PHASES = {
    "forward": ("Accumulator.add", 50),
    "reduce": ("sum_over_workers", 6),
    "solve": ("_solve_share", 10),
    "gather": ("_gather_", 10),
    "write": ("RemoteFiles.write", 7),
}
"""What a worker calls in each phase, and which call: one of the second block's (of the first two, where it writes).

They come in another number on each worker, depending on how these share the work.
"""


@pytest.mark.parametrize("phase", PHASES)
def test_a_node_that_loses_its_power_is_replaced(lab: Lab, expected: dict[str, bytes], phase: str) -> None:
    point, count = PHASES[phase]
    output = lab.disk / f"lost-in-{phase}"
    lost = lab.prune_disturbed(output, "2", ("worker", point, count, "freeze"), lab.power_off)
    assert lab.contents(output) == expected
    pools = lab.pools(output)
    assert [len(nodes) for nodes in pools] == [2, 2]
    assert lost in pools[0]
    assert lost not in pools[1]


def test_the_run_goes_on_with_the_node_that_is_left(lab: Lab, expected: dict[str, bytes]) -> None:
    lab.power_off("three")
    output = lab.disk / "one-left"
    lab.prune_disturbed(output, "2", ("worker", "sum_over_workers", 6, "freeze"), lab.power_off)
    assert lab.contents(output) == expected
    assert [len(nodes) for nodes in lab.pools(output)] == [2, 1]


def test_a_worker_that_freezes_is_replaced(lab: Lab, expected: dict[str, bytes]) -> None:
    output = lab.disk / "frozen"
    lab.prune_disturbed(output, "2", ("worker", "_solve_share", 10, "freeze"), lambda node: None)
    assert lab.contents(output) == expected
    assert [len(nodes) for nodes in lab.pools(output)] == [2, 2]


def test_a_node_that_joins_is_used(lab: Lab, expected: dict[str, bytes]) -> None:
    lab.power_off("two")
    lab.power_off("three")
    output = lab.disk / "joined"
    lab.prune_disturbed(output, "auto", ("driver", "append", 3, "wait"), lambda node: lab.start("two"))
    assert lab.contents(output) == expected
    assert lab.pools(output) == [{"one"}, {"one", "two"}]


def test_a_cluster_that_comes_back_finds_the_run_by_its_output(lab: Lab, expected: dict[str, bytes]) -> None:
    """The head loses its power, and the driver with it; then the others; all begin anew."""
    output = lab.shared / "head-lost"
    with lab.disturbed(output, "2", ("driver", "append", 5, "wait")) as (process, name):
        assert name == "head"
        for node in ("head", "one", "two", "three"):
            lab.power_off(node)
        process.communicate(timeout=60)
    lab.start("head")
    lab.start("one", "two", "three")
    done = lab.prune(output, "2")
    assert done.code == 0, done.err
    assert lab.contents(output) == expected
    journal = [json.loads(line)["kind"] for line in (output / "billhook/journal.jsonl").read_text().splitlines()]
    assert journal.count("start") == 2
    assert journal.count("block") == 5, "a block that was done was done again"
