"""Rows that were to lose numbers of their own are found out where they did not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from billhook.orchestrator.checkpoint import open_file
from billhook.orchestrator.promised_rows import broken_promise


@pytest.mark.parametrize("transposed", [False, True])
def test_a_row_that_kept_too_much_is_named(tmp_path: Path, transposed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("billhook.orchestrator.inspection.CHUNK_BYTES", 100)
    counts = [0, 3, 5, 1, 2, 0, 4]
    weight = torch.ones(7, 30)
    for row, count in enumerate(counts):
        weight[row, row : row + count] = 0.0
    weight[5, 29] = 0.0  # a zero of the source
    stored = weight.t().contiguous() if transposed else weight
    save_file({"w": stored}, tmp_path / "w.safetensors")
    (entry,) = open_file(tmp_path / "w.safetensors").entries

    def found(removed: int, counts: list[int]) -> str | None:
        return broken_promise(entry, transposed, removed, counts)

    assert found(15, counts) is None
    assert found(16, counts) == "lost 16 weights, its rows were to lose 15"
    assert found(15, [0, 3, 5, 0, 3, 0, 4]) == "holds 2 zeros in row 4, 3 were to be removed"
    assert found(15, [15]) == "has 7 rows, the table of its allocation has 1"
