"""A run that is killed at any instant, resumed, and perhaps killed again ends with the same bytes."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from billhook.orchestrator.history import read_history
from billhook.orchestrator.journal import read_journal

Lab = Any

POINTS = [
    ("worker", "preadv", "kill"),
    ("worker", "Accumulator.add", "kill"),
    ("worker", "solve_stage", "kill"),
    ("worker", "pwrite", "kill"),
    ("worker", "pwrite", "torn"),
    ("worker", "fsync", "kill"),
    ("worker", "Accumulator.add", "kill driver"),
    ("worker", "solve_stage", "kill driver"),
    ("worker", "pwrite", "kill driver"),
    ("worker", "preadv", "kill all"),
    ("worker", "Accumulator.add", "kill all"),
    ("worker", "solve_stage", "kill all"),
    ("worker", "pwrite", "kill all"),
    ("worker", "fsync", "kill all"),
    ("driver", "pwrite", "kill"),
    ("driver", "pwrite", "torn"),
    ("driver", "pwrite", "kill all"),
    ("driver", "fsync", "kill"),
    ("driver", "fsync", "kill all"),
    ("driver", "rename", "kill"),
    ("driver", "copyfile", "kill"),
    ("driver", "sha256_of", "kill"),
    ("driver", "unlink", "kill all"),
]
"""Role, point and action: reading, the forward pass, solving, writing a shard, syncing, the journal, finishing."""

ROUNDS = 3
"""Of :data:`POINTS`, each at a call drawn anew: 69 kills, and more of the runs that go on."""

FEW = (("worker", "pwrite", "kill driver"), ("driver", "fsync", "kill"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run all faults where that is asked for, else a few."""
    if "seed" in metafunc.fixturenames:
        everything = [(*point, seed) for seed in range(ROUNDS) for point in POINTS]
        few = [(*point, 0) for point in FEW]
        chosen = everything if metafunc.config.getoption("--all-faults") else few
        metafunc.parametrize(("role", "point", "action", "seed"), chosen)


def test_a_killed_run_goes_on_to_the_same_bytes(
    lab: Lab, tmp_path: Path, role: str, point: str, action: str, seed: int
) -> None:
    rng = random.Random(f"{role} {point} {action} {seed}")
    output = tmp_path / "out"
    joined = seed != 1 and action != "kill all"
    ended = lab.prune(output, lab.fault(rng, role, point, action), joined)
    assert ended.happened
    assert ended.code == (0 if role == "worker" and action in ("kill", "torn") else -9), (
        ended.err
    )  # a worker is replaced
    if seed % 3 == 2:  # killed again, somewhere else, if it gets there
        again = rng.choice(POINTS)
        lab.resume(output, lab.fault(rng, *again), joined and again[2] != "kill all")
    committed = [line["index"] for line in read_journal(output) if line["kind"] == "block"]
    go_on = lab.resume if read_history(output).decided and rng.random() < 0.5 else lab.prune
    resumed = go_on(output, joined=joined, workers=rng.choice([1, 2]))
    assert resumed.code == 0, resumed.err
    assert lab.contents(output) == lab.expected
    assert not (output / "billhook" / "activations").exists()
    indices = [line["index"] for line in read_journal(output) if line["kind"] == "block"]
    assert indices == list(range(5)), "a block that was committed was done again"
    assert indices[: len(committed)] == committed
