from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch

from billhook.kernels.select import smallest_reference
from billhook.layerworkers.collective import Alone
from billhook.layerworkers.errors import InputError, RunError
from billhook.layerworkers.patterns import NM, Selector, Unstructured, parse_pattern


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


def test_a_nan_score_is_an_error() -> None:
    with pytest.raises(RunError, match="NaN"):
        Selector(Unstructured(Fraction(1, 2)), False, Alone())(torch.tensor([[1.0, float("nan")]]))
