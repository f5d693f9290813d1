"""Nodes that share nothing but a cluster make what one worker makes by itself."""

from __future__ import annotations

from typing import Any

import pytest

Lab = Any


@pytest.mark.parametrize(
    ("workers", "driver", "place"),
    [("2", "head", "shared"), ("2", "head", "disk"), ("3", "one", "disk")],
    ids=["all see the output", "only the driver sees the output", "and a worker beside the driver"],
)
def test_nodes_make_the_same_bytes(lab: Lab, expected: dict[str, bytes], workers: str, driver: str, place: str) -> None:
    output = getattr(lab, place) / f"{driver}-{workers}"
    done = lab.prune(output, workers, driver)
    assert done.code == 0, done.err
    assert lab.contents(output, driver) == expected
    assert [len(nodes) for nodes in lab.pools(output, driver)] == [int(workers)]
