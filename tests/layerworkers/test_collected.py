"""Statistics on disk: what is read is what was summed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from billhook.layerworkers.collected import collected_floats, read_collected, write_collected
from billhook.layerworkers.files import read_bytes
from billhook.layerworkers.output_files import LocalFiles
from billhook.layerworkers.shards import TensorEntry
from billhook.layerworkers.statistics import COLUMN_SQUARES, GRAM, GRAM_AND_MOMENTS, MOMENTS, Accumulator
from billhook.layerworkers.transfer import BlockWriter

CPU = torch.device("cpu")


@pytest.mark.parametrize("columns", [1, 5, 2100], ids=["one", "few", "more than a band"])
def test_each_statistic_is_that_of_the_same_tokens(columns: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(7, columns) for _ in range(3)]
    totals = {}
    for statistic in (GRAM_AND_MOMENTS, GRAM, MOMENTS, COLUMN_SQUARES):
        sums = Accumulator(statistic, columns, 4, CPU)
        for number, x in enumerate(inputs):
            sums.add(number, x)
        (node,) = sums.nodes()
        totals[statistic] = node.total
    size, begin = collected_floats(columns), 24
    path = tmp_path / "file"
    path.write_bytes(bytes(begin + 4 * size))
    entry = TensorEntry("input", str(path), "F32", (size,), begin, begin + 4 * size)
    writer = BlockWriter(LocalFiles(None))
    total = totals.pop(GRAM_AND_MOMENTS)
    assert isinstance(total, torch.Tensor)
    write_collected(total, entry, writer.write_rows)
    writer.sync(lambda: None)
    writer.wait()
    for statistic, expected in totals.items():
        assert isinstance(expected, torch.Tensor)
        found = read_collected(entry, statistic, columns, CPU, read_bytes)
        assert torch.equal(found, expected.tril() if statistic is GRAM else expected), statistic.name
