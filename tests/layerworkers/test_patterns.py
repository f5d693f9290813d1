from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch

from billhook.kernels.select import smallest_by_row, smallest_reference
from billhook.layerworkers.collective import Alone
from billhook.layerworkers.errors import InputError, RunError
from billhook.layerworkers.patterns import NM, PerRow, Selector, Unstructured, of_rows, parse_pattern


def test_a_sparsity_is_the_decimal_that_was_written() -> None:
    pattern = parse_pattern("unstructured", 0.7)
    assert pattern.sparsity == Fraction(7, 10)
    assert int(pattern.sparsity * 10) == 7  # in binary, 0.7 * 10 is 7.0 but 0.29 * 100 is 28.999...
    assert int(parse_pattern("unstructured", 0.29).sparsity * 100) == 29


def test_n_counts_what_is_kept() -> None:
    assert parse_pattern("1:4", None) == NM(keep=1, group=4)
    assert parse_pattern("1:4", None).sparsity == Fraction(3, 4)
    assert parse_pattern("1:4", 0.75) == NM(1, 4)


@pytest.mark.parametrize(
    ("text", "sparsity", "message"),
    [
        ("unstructured", 1.0, "share in"),
        ("unstructured", -0.1, "share in"),
        ("unstructured", float("nan"), "share in"),
        ("2:4", 0.7, "contradicts"),
        ("0:4", None, "1 <= N <= M"),
        ("5:4", None, "1 <= N <= M"),
        ("2x4", None, "expected 'unstructured' or N:M"),
    ],
)
def test_bad_patterns_are_refused(text: str, sparsity: float | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_pattern(text, sparsity)


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("sparsity", ["0", "0.5", "0.77", "0.999"])
def test_the_smallest_over_several_workers_are_those_of_the_whole(run_group: Any, workers: int, sparsity: str) -> None:
    torch.manual_seed(0)
    score = torch.randint(0, 40, (9, 30)).float() / 7  # many ties, also across workers
    parts = score.split([score.shape[0] // workers] * (workers - 1) + [9 - 9 // workers * (workers - 1)])
    pattern = Unstructured(Fraction(sparsity))
    masks = run_group(workers, lambda group: Selector(pattern, False, group)(parts[group.rank]))
    assert torch.equal(torch.cat(masks), smallest_reference(score, int(pattern.sparsity * score.numel())))


@pytest.mark.parametrize("within_rows", [True, False])
def test_rows_lose_numbers_of_their_own_also_by_parts_and_in_some_of_the_columns(within_rows: bool) -> None:
    score = torch.rand(9, 20, generator=torch.Generator().manual_seed(0))
    pattern = PerRow((0, 20, 3, 5, 7, 11, 1, 2, 19), 20)
    select = Selector(pattern, within_rows, Alone())
    assert pattern.sparsity == Fraction(68, 180)
    assert torch.equal(select(score), smallest_by_row(score, torch.tensor(pattern.counts)))
    assert select.to_remove(score) == 68
    assert select.part(score, Fraction(1, 2)).sum(dim=1).tolist() == [0, 10, 1, 2, 3, 5, 0, 1, 9]
    assert select(score[:, :10]).sum(dim=1).tolist() == [0, 10, 1, 2, 3, 5, 0, 1, 9]
    some = of_rows(pattern, 3, 6)
    assert Selector(some, within_rows, Alone())(score[3:6]).sum(dim=1).tolist() == [5, 7, 11]
    assert of_rows(NM(2, 4), 3, 6) == NM(2, 4)


def test_a_nan_score_is_an_error() -> None:
    with pytest.raises(RunError, match="NaN"):
        Selector(Unstructured(Fraction(1, 2)), False, Alone())(torch.tensor([[1.0, float("nan")]]))
