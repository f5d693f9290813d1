"""Exact budgets: entries to remove from each linear that add up to what was asked of all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from billhook.layerworkers.water_filling import filled


@dataclass(frozen=True)
class Matrix:
    """A linear's weight."""

    name: str
    rows: int
    columns: int
    step: int = 1
    """Entries that are removed together: as many as rows where each row loses as many as the others."""

    @property
    def size(self) -> int:
        """Entries."""
        return self.rows * self.columns


def to_budget(sparsities: Sequence[float], matrices: Sequence[Matrix], sparsity: Fraction) -> list[int]:
    """Return how many entries of each matrix to remove: in all ``floor(sparsity * entries)``, or less than a step less.

    All sparsities are shifted by the same amount, and clipped to what can be removed, until the sum is right: what one
    cannot take, the others share (water-filling). At least one step of each matrix is left. Of the parts of a step
    that are cut off the largest are rounded up, by their order where they are equal.
    """
    total = int(sparsity * sum(matrix.size for matrix in matrices))
    steps = [matrix.step for matrix in matrices]
    most = [matrix.size // matrix.step * matrix.step - matrix.step for matrix in matrices]
    counts = filled(sparsities, [matrix.size for matrix in matrices], most, total)
    removed = [int(count) // step * step for count, step in zip(counts, steps, strict=True)]
    by_remainder = sorted(range(len(steps)), key=lambda index: (removed[index] - counts[index]) / steps[index])
    missing = total - sum(removed)
    while missing > 0:
        taken = 0
        for index in by_remainder:
            if steps[index] <= missing and removed[index] + steps[index] <= most[index]:
                removed[index] += steps[index]
                missing -= steps[index]
                taken += 1
        if not taken:
            break
    return removed
