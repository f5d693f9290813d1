"""Which entries of a weight may be chosen together: unstructured or N:M, with exact counts.

N:M keeps N of every M consecutive input columns (``2:4`` keeps two and removes two).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from billhook.kernels import select as kernels
from billhook.layerworkers.collective import Collective, all_gather
from billhook.layerworkers.errors import NotFiniteError, OptionError


@dataclass(frozen=True)
class Unstructured:
    """Any entries; a comparison group of n entries loses ``floor(sparsity * n)``."""

    sparsity: Fraction

    def __str__(self) -> str:
        return "unstructured"


@dataclass(frozen=True)
class NM:
    """``keep`` of every ``group`` consecutive columns of a row survive."""

    keep: int
    group: int

    @property
    def sparsity(self) -> Fraction:
        """The share that is removed."""
        return Fraction(self.group - self.keep, self.group)

    def __str__(self) -> str:
        return f"{self.keep}:{self.group}"


@dataclass(frozen=True)
class PerRow:
    """Any entries, but each row loses a number of its own."""

    counts: tuple[int, ...]
    """Of each row."""
    columns: int

    @property
    def sparsity(self) -> Fraction:
        """The share that is removed."""
        return Fraction(sum(self.counts), len(self.counts) * self.columns)

    def __str__(self) -> str:
        return "unstructured"


Pattern = Unstructured | NM | PerRow


def of_rows(pattern: Pattern, start: int, stop: int) -> Pattern:
    """Return what some rows of a linear lose, given what it loses."""
    return PerRow(pattern.counts[start:stop], pattern.columns) if isinstance(pattern, PerRow) else pattern


def exact_fraction(value: float) -> Fraction:
    """Return the decimal that a person wrote: 0.7 as 7/10, not as the nearest binary number."""
    return Fraction(repr(value))


def parse_pattern(text: str, sparsity: float | None) -> Pattern:
    """Build a pattern from the options ``--pattern`` and ``--sparsity`` (None: not given).

    Raises:
        InputError: for a sparsity outside [0, 1), an unknown pattern, or a sparsity that contradicts N:M.
    """
    if sparsity is not None and not 0 <= sparsity < 1:
        raise OptionError(f"--sparsity {sparsity}: expected a share in [0, 1), for example 0.5 for half of the weights")
    if text == "unstructured":
        return Unstructured(exact_fraction(0.5 if sparsity is None else sparsity))
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if match is None:
        raise OptionError(f"--pattern {text}: expected 'unstructured' or N:M such as 2:4 (N weights kept of every M)")
    keep, group = int(match[1]), int(match[2])
    if not 1 <= keep <= group:
        raise OptionError(f"--pattern {text}: N counts the weights kept of every M, so 1 <= N <= M is needed")
    pattern = NM(keep, group)
    if sparsity is not None and exact_fraction(sparsity) != pattern.sparsity:
        raise OptionError(
            f"--sparsity {sparsity} contradicts --pattern {text}, which fixes it at {float(pattern.sparsity):g}; "
            "leave --sparsity out"
        )
    return pattern


def refuse_nan(score_RC: Tensor) -> None:
    """Check scores, or what was computed from them.

    Raises:
        RunError: when one is NaN.
    """
    if torch.isnan(score_RC.amin()):
        raise NotFiniteError("a score is NaN: the statistics or the weights of this linear overflowed float32")


@dataclass(frozen=True)
class Selector:
    """Chooses which entries of a linear to remove: the only way in which a method may do so.

    Unstructured selection compares all rows of the linear, also those on other workers (the same call must then be
    made on each of them, in the same order), or, with ``within_rows``, each row by itself, as it does where each row
    loses a number of its own. What is compared is the score given: a method that passes some of the columns has them
    compared among themselves.
    """

    pattern: Pattern
    within_rows: bool
    owners: Collective
    """The workers that hold rows of the linear; ranks are in the order of the rows."""

    def __call__(self, score_RC: Tensor) -> Tensor:
        """Return the mask [R, C] of the entries to remove: those with the smallest scores, ties by index.

        score_RC: [R, C] float32, this worker's rows.

        Raises:
            RunError: when a score is NaN.
        """
        refuse_nan(score_RC)
        if isinstance(self.pattern, NM):
            return kernels.smallest_in_groups(score_RC, self.pattern.keep, self.pattern.group)
        if isinstance(self.pattern, PerRow):
            return kernels.smallest_by_row(score_RC, _counts(self.pattern, score_RC.shape[1], Fraction(1)))
        if self.within_rows:
            return kernels.smallest_in_rows(score_RC, int(self.pattern.sparsity * score_RC.shape[1]))
        return self._smallest_over_owners(score_RC, lambda total: int(self.pattern.sparsity * total))

    def part(self, score_RC: Tensor, share: Fraction) -> Tensor:
        """Return the mask of a share of the entries that the pattern removes: those with the smallest scores.

        For N:M, each row gives up the smallest of what its groups would give up in the end.

        Raises:
            RunError: when a score is NaN.
        """
        if share == 1:
            return self(score_RC)
        refuse_nan(score_RC)
        wanted = share * self.pattern.sparsity
        if isinstance(self.pattern, NM):
            kept_RC = self(score_RC).logical_not_()
            return kernels.smallest_in_rows(score_RC.masked_fill(kept_RC, torch.inf), int(wanted * score_RC.shape[1]))
        if isinstance(self.pattern, PerRow):
            return kernels.smallest_by_row(score_RC, _counts(self.pattern, score_RC.shape[1], share))
        if self.within_rows:
            return kernels.smallest_in_rows(score_RC, int(wanted * score_RC.shape[1]))
        return self._smallest_over_owners(score_RC, lambda total: int(wanted * total))

    def smallest(self, score_RC: Tensor, count: int) -> Tensor:
        """Return the mask of the ``count`` smallest scores of all owners' rows, whatever the pattern; ties by index.

        Raises:
            RunError: when a score is NaN.
        """
        refuse_nan(score_RC)
        return self._smallest_over_owners(score_RC, lambda total: count)

    def count(self, mask_RC: Tensor) -> int:
        """Return how many entries of all owners' masks are set."""
        own = int(mask_RC.count_nonzero())
        if self.owners.size == 1:
            return own
        return sum(int(each[0]) for each in all_gather(self.owners, np.array([own], dtype=np.int64)))

    def to_remove(self, weight_RC: Tensor) -> int:
        """Return how many entries the pattern removes of all owners' rows."""
        return int(self.pattern.sparsity * self.count(torch.ones_like(weight_RC, dtype=torch.bool)))

    def _smallest_over_owners(self, score_RC: Tensor, wanted_of: Callable[[int], int]) -> Tensor:
        """Find the k-th smallest of all owners exactly, a few bits of its key at a time."""
        known, prefix, wanted = 0, 0, -1
        for bits in kernels.KEY_LEVELS:
            counts = self._gather_histograms(kernels.histogram(score_RC, known, prefix, bits))
            total = counts.sum(dim=0)
            if known == 0:
                wanted = wanted_of(int(total.sum()))
                if wanted == 0:
                    return torch.zeros_like(score_RC, dtype=torch.bool)
            bin_index, before = kernels.bin_of(total, wanted)
            known, prefix, wanted = known + bits, prefix << bits | bin_index, wanted - before
        ties_before = int(counts[: self.owners.rank, bin_index].sum())
        return kernels.below_with_ties(score_RC, prefix, wanted - ties_before)

    def _gather_histograms(self, histogram: Tensor) -> Tensor:
        """Return the histograms of all owners, [owners, bins]."""
        if self.owners.size == 1:
            return histogram[None].cpu()
        received = all_gather(self.owners, histogram.to(torch.int32).cpu().numpy())
        return torch.stack([torch.tensor(counts, dtype=torch.int64) for counts in received])


def _counts(pattern: PerRow, columns: int, share: Fraction) -> Tensor:
    """Return how many entries each row loses of so many of its columns, in all the share of what it loses: [R]."""
    above, below = share.numerator * columns, share.denominator * pattern.columns
    return torch.tensor([count * above // below for count in pattern.counts])
