"""What each row of a linear was to lose, as the tables beside a run have it, and whether it did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from billhook.layerworkers.shards import TensorEntry
from billhook.orchestrator.allocation import Allocation, tabled
from billhook.orchestrator.history import Decided, History
from billhook.orchestrator.inspection import pieces
from billhook.orchestrator.journal import FOLDER

STORED = "allocation"
"""Begin of the names of the files in a run's folder that hold what was found out."""


def promised_rows(output: Path, history: History) -> Mapping[str, Sequence[int]]:
    """Return how many entries each row was to lose, by the names of the committed blocks' linears.

    Only what a table says by row, and only of tables that are still there as the journal knows them.
    """
    tables = [(each.first_block, _table_of(output, each)) for each in history.decided]
    promised: dict[str, Sequence[int]] = {}
    for block in history.blocks:
        table = [table for first, table in tables if first <= block["index"]][-1]
        names = [linear["name"] for linear in block["linears"]]
        promised |= {name: table.by_row[name] for name in names if table and name in table.by_row}
    return promised


def _table_of(output: Path, decided: Decided) -> Allocation | None:
    """Return the table that blocks were pruned by; None where it is not found."""
    _, _, sha256 = decided.fingerprint["recipe"]["allocation"].partition(" ")
    files = [*sorted((output / FOLDER).glob(f"{STORED}-*.json")), Path(decided.asked["recipe"]["allocation"])]
    found = (tabled(path) for path in files if sha256)
    return next((table for table in found if table is not None and table.sha256 == sha256), None)


def broken_promise(entry: TensorEntry, transposed: bool, removed: int, counts: Sequence[int]) -> str | None:
    """Return what is wrong with the rows of a linear that was to lose these counts; None where nothing is.

    transposed: whether it is stored as its transpose. removed: entries that it lost, as recorded.
    """
    if removed != sum(counts):
        return f"lost {removed} weights, its rows were to lose {sum(counts)}"
    zeros_R = _zeros_by_row(entry, transposed)
    if len(zeros_R) != len(counts):
        return f"has {len(zeros_R)} rows, the table of its allocation has {len(counts)}"
    short = (zeros_R < torch.tensor(list(counts))).nonzero()
    if len(short):
        row = int(short[0])
        return f"holds {int(zeros_R[row])} zeros in row {row}, {counts[row]} were to be removed"
    return None


def _zeros_by_row(entry: TensorEntry, transposed: bool) -> Tensor:
    zeros = [(piece == 0).sum(dim=0 if transposed else 1) for piece in pieces(entry)]
    return torch.stack(zeros).sum(dim=0) if transposed else torch.cat(zeros)
