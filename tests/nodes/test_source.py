"""Every node has its own copy of the source; one that has none, or another, is named before anything is written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

Lab = Any


@pytest.fixture
def copy(lab: Lab) -> Iterator[Path]:
    """The source on the node ``two``, put back afterwards."""
    folder = lab.nodes["two"].disk / "model"
    aside = folder.with_name("aside")
    folder.rename(aside)
    yield folder
    if folder.exists():
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
    aside.rename(folder)


def test_a_node_without_the_source_is_named(lab: Lab, copy: Path) -> None:
    output = lab.disk / "refused"
    done = lab.prune(output, "3")
    assert done.code == 2, done.err
    last = done.err.splitlines()[-1]
    assert f"on two, 10.99.0.3: {lab.disk}/model" in last
    assert not lab.seen(output, "head").exists()


def test_a_node_with_another_source_is_named(lab: Lab, copy: Path) -> None:
    copy.mkdir()
    for path in copy.with_name("aside").iterdir():
        (copy / path.name).write_bytes(path.read_bytes().replace(b'"format":"pt"', b'"format":"np"', 1))
    output = lab.disk / "refused"
    done = lab.prune(output, "3")
    assert done.code == 2, done.err
    last = done.err.splitlines()[-1]
    assert f"on two, 10.99.0.3: {lab.disk}/model differs" in last
    assert not lab.seen(output, "head").exists()
