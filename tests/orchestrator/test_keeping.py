from __future__ import annotations

import pytest

from billhook.orchestrator.keeping import MAX_SHARE, keep_every
from billhook.orchestrator.recipe import RunOptions, merged_options


def test_the_cadence_is_youngs_where_it_can_be_afforded() -> None:
    assert keep_every(blocks=32, block_seconds=1e9, keep_seconds=4.0, replay_seconds=1.0) == 16  # sqrt(2 * 32 * 4)
    assert keep_every(blocks=32, block_seconds=1e9, keep_seconds=0.001, replay_seconds=1.0) == 1
    assert keep_every(blocks=32, block_seconds=1e9, keep_seconds=1.0, replay_seconds=0.001) == 0
    assert keep_every(blocks=32, block_seconds=1e9, keep_seconds=1.0, replay_seconds=0.0) == 0


@pytest.mark.parametrize("block_seconds", [1.0, 3.0, 10.0])
def test_keeping_never_takes_more_than_its_share(block_seconds: float) -> None:
    every = keep_every(blocks=1000, block_seconds=block_seconds, keep_seconds=0.5, replay_seconds=10.0)
    assert 0.5 / every <= MAX_SHARE * block_seconds


BEFORE = {
    **{"method": "sparsegpt", "options": {"damping": 0.02}, "pattern": "unstructured", "sparsity": 0.6, "seed": 1},
    **{"allocation": "uniform", "allocation_options": {}},
}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {}),
        ({"options": {"blocksize": 64}}, {"options": {"damping": 0.02, "blocksize": 64}}),
        ({"method": "wanda"}, {"method": "wanda", "options": {}}),
        ({"pattern": "2:4"}, {"pattern": "2:4", "sparsity": None}),
        ({"sparsity": 0.7}, {"sparsity": 0.7}),
    ],
)
def test_what_is_given_to_a_resumed_run_wins(given: RunOptions, expected: dict[str, object]) -> None:
    assert merged_options(BEFORE, given) == {**BEFORE, **expected}
