"""The table of an allocation: made for a request's linears, written to a file, and read again."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from billhook.layerworkers.errors import OptionError, nearest
from billhook.layerworkers.row_shares import row_counts
from billhook.orchestrator.allocation.allocators import ALLOCATORS
from billhook.orchestrator.allocation.budget import Matrix, to_budget
from billhook.orchestrator.allocation.contract import Evidence, ForRows
from billhook.orchestrator.allocation.row_text import read_counts, text_of
from billhook.orchestrator.paths import user_path


@dataclass(frozen=True)
class Allocation:
    """How many entries of each linear are removed."""

    name: str
    """Of the allocator."""
    removed: Mapping[str, int]
    """By the name on disk of the linear's weight."""
    sizes: Mapping[str, int]
    """Entries, by the same names."""
    by_row: Mapping[str, array[int]] = field(default_factory=dict)
    """How many of them each row loses, of the linears whose rows do not lose the same."""

    def sparsity_of(self, name: str) -> Fraction:
        """Return the exact share of a linear that is removed."""
        return Fraction(self.removed[name], self.sizes[name])

    @property
    def sparsity(self) -> Fraction:
        """The share of all linears together."""
        return Fraction(sum(self.removed.values()), sum(self.sizes.values()))

    @property
    def sha256(self) -> str:
        """What tells this allocation from any other."""
        told: list[Any] = sorted(self.removed.items())
        if self.by_row:
            told = [told, sorted((name, text_of(counts)) for name, counts in self.by_row.items())]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()

    def rows_of(self, name: str) -> tuple[float, float]:
        """Return the lowest and the highest share that a row of a linear loses."""
        if (counts := self.by_row.get(name)) is None:
            return float(self.sparsity_of(name)), float(self.sparsity_of(name))
        columns = self.sizes[name] // len(counts)
        return min(counts) / columns, max(counts) / columns


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")

    class Share(BaseModel):
        """One linear."""

        model_config = ConfigDict(extra="forbid")
        removed: int
        of: int
        rows: str | None = None

    allocation: str
    sparsity: float
    linears: dict[str, Share]


def allocated(name: str, options: Any, evidence: Evidence, sparsity: Fraction) -> Allocation:
    """Return what an allocator makes of a model; ``options`` are its own."""
    found = ALLOCATORS[name].sparsities(evidence, float(sparsity), options)
    wanted = found if isinstance(found, ForRows) else ForRows(found, {}, 0.0)
    counts = to_budget(wanted.sparsities, evidence.matrices, sparsity)
    removed = {matrix.name: count for matrix, count in zip(evidence.matrices, counts, strict=True)}
    return Allocation(
        name,
        removed,
        {matrix.name: matrix.size for matrix in evidence.matrices},
        {
            matrix.name: array("i", row_counts(score_R, matrix.columns, removed[matrix.name], wanted.spread).tolist())
            for matrix in evidence.matrices
            if (score_R := wanted.scores.get(matrix.name)) is not None
        },
    )


def check_allocator(name: str) -> None:
    """Check that there is an allocator of that name.

    Raises:
        InputError: when there is none.
    """
    if name not in ALLOCATORS:
        raise OptionError(
            f"--allocation {name}: neither a file nor an allocator{nearest(name, list(ALLOCATORS))}; known are "
            f"{', '.join(ALLOCATORS)}"
        )


def write_allocation(allocation: Allocation, path: Path) -> None:
    """Write an allocation as JSON, for :func:`read_allocation` and for a person."""
    document: dict[str, Any] = {
        "allocation": allocation.name,
        "sparsity": float(allocation.sparsity),
        "linears": {
            name: {
                "removed": count,
                "of": allocation.sizes[name],
                **({"rows": text_of(allocation.by_row[name])} if name in allocation.by_row else {}),
            }
            for name, count in allocation.removed.items()
        },
    }
    draft = path.with_name(f".{path.name}.part")
    draft.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    draft.replace(path)


def tabled(path: Path) -> Allocation | None:
    """Return what a file says, whatever model it is of; None where it is no table."""
    try:
        found = _File.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValidationError):
        return None
    rows = {name: read_counts(share.rows, share.of) for name, share in found.linears.items() if share.rows is not None}
    return Allocation(
        found.allocation,
        {name: share.removed for name, share in found.linears.items()},
        {name: share.of for name, share in found.linears.items()},
        {name: counts for name, counts in rows.items() if counts is not None},
    )


def read_allocation(path: str, matrices: Sequence[Matrix]) -> Allocation:
    """Read the file of an allocation for these matrices.

    Raises:
        InputError: when it is none, or one for other linears, or asks for what the method cannot remove.
    """
    try:
        found = _File.model_validate_json(user_path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"--allocation {path}: cannot be read: {error}") from error
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise OptionError(
            f"--allocation {path}: {where or 'the file'}: {problem['msg']}; 'billhook allocate' writes such files"
        ) from error
    expected = {matrix.name: matrix for matrix in matrices}
    for name in [*(expected.keys() - found.linears.keys()), *(found.linears.keys() - expected.keys())]:
        where = "the file" if name in expected else "what is pruned of the model"
        raise OptionError(
            f"--allocation {path}: {name} is missing in {where}; make the file with the same model, --include and "
            "--exclude"
        )
    by_row: dict[str, array[int]] = {}
    for name, share in found.linears.items():
        matrix = expected[name]
        if share.of != matrix.size:
            raise OptionError(
                f"--allocation {path}: {name} has {matrix.size} entries, not {share.of}; the file is of another model"
            )
        if not 0 <= share.removed < matrix.size:
            raise OptionError(f"--allocation {path}: {name}: cannot remove {share.removed} of {matrix.size} entries")
        if share.rows is not None:
            by_row[name] = _checked_rows(path, matrix, share.removed, share.rows)
        elif share.removed % matrix.step:
            raise OptionError(
                f"--allocation {path}: {name}: the method removes as many entries from each of the {matrix.rows} rows, "
                f"and {share.removed} is no multiple of that; make the file with the same --method"
            )
    return Allocation(
        found.allocation,
        {matrix.name: found.linears[matrix.name].removed for matrix in matrices},
        {matrix.name: matrix.size for matrix in matrices},
        by_row,
    )


def _checked_rows(path: str, matrix: Matrix, removed: int, text: str) -> array[int]:
    """Return what the rows of a matrix lose, as a file has it."""
    where = f"--allocation {path}: {matrix.name}"
    if matrix.step != matrix.rows:
        raise OptionError(
            f"{where}: the file says what each row loses, and the method compares all rows together; make the file "
            "with the same --method"
        )
    counts = read_counts(text, matrix.rows)
    if counts is None or len(counts) != matrix.rows:
        raise OptionError(
            f"{where}: its rows are no list of {matrix.rows} numbers such as '12 13*4', in which 13 stands four times"
        )
    if max(counts) > matrix.columns:
        raise OptionError(f"{where}: cannot remove {max(counts)} of the {matrix.columns} entries of a row")
    if sum(counts) != removed:
        raise OptionError(f"{where}: its rows lose {sum(counts)} entries together, not {removed}")
    return counts
