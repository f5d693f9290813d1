"""The compiled swaps against the formula, and the formula against the error that it predicts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from billhook.kernels import swaps
from billhook.kernels.swaps import swap_, swap_reference_, swap_rows_together_

BOTH = pytest.mark.parametrize("swap", [swap_, swap_rows_together_], ids=["loop", "together"])
"""What a CPU runs, and what a GPU runs."""


@pytest.fixture(autouse=True)
def few_rows_in_a_band(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swaps, "BAND_ROWS", 4)


def problem(rows: int, columns: int, updated: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    x = torch.randn(2 * columns, columns, generator=generator)
    x = x @ (torch.eye(columns) + 0.5 * torch.randn(columns, columns, generator=generator) / columns**0.5)
    a = x.T @ x / len(x)
    a = (a + a.T) / 2
    w = torch.randn(rows, columns, generator=generator)
    v = w * (torch.rand(rows, columns, generator=generator) < 0.5)
    return v * (1.1 if updated else 1.0), w, a


def errors(v: torch.Tensor, w: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    e = (w - v).double()
    return ((e @ a.double()) * e).sum(dim=1)


@BOTH
@pytest.mark.parametrize("updated", [False, True])
@pytest.mark.parametrize(
    ("rows", "columns", "group"), [(1, 4, 4), (5, 33, 33), (4, 96, 96), (6, 64, 4), (3, 30, 3), (2, 80, 40)]
)
def test_the_same_swaps_as_of_the_reference(
    rows: int, columns: int, group: int, updated: bool, swap: Callable[..., None]
) -> None:
    v, w, a = problem(rows, columns, updated)
    for limit in (1, 2, 7):
        fast, slow = v.clone(), v.clone()
        swap(fast, w, a, group, limit, 16)
        swap_reference_(slow, w, a, group, limit)
        assert torch.equal(fast, slow)


@BOTH
@pytest.mark.parametrize("group", [240, 40])
@pytest.mark.parametrize("common", [0.0, 3.0])
def test_nothing_that_could_be_the_best_is_left_out(group: int, common: float, swap: Callable[..., None]) -> None:
    """Inputs that all share a part, and whole numbers, of which many pairs save the same."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(-2, 3, (300, 240), generator=generator) + common * torch.randint(
        -1, 2, (300, 1), generator=generator
    )
    w = torch.randint(-3, 4, (6, 240), generator=generator).float()
    v = w * (torch.rand(w.shape, generator=generator) < 0.4)
    for limit in (1, 6):
        fast, slow = v.clone(), v.clone()
        swap(fast, w, x.T @ x, group, limit, 16)
        swap_reference_(slow, w, x.T @ x, group, limit)
        assert torch.equal(fast, slow)
        assert not torch.equal(fast, v)


@pytest.mark.parametrize("updated", [False, True])
def test_each_swap_is_the_best_and_the_last_leaves_none(updated: bool) -> None:
    v, w, a = problem(1, 12, updated)
    for _ in range(30):
        candidates = {}
        for p in range(12):
            for u in range(12):
                if v[0, p] == 0 and v[0, u] != 0:
                    other = v.clone()
                    other[0, p], other[0, u] = w[0, p], 0.0
                    candidates[p, u] = float(errors(other, w, a))
        before = float(errors(v, w, a))
        swap_(v, w, a, 12, 1, 16)
        assert float(errors(v, w, a)) == pytest.approx(min(before, *candidates.values()), rel=1e-4)
        if min(candidates.values()) >= before:
            return
    raise AssertionError("it never ended")


@BOTH
@pytest.mark.parametrize("group", [4, 32])
def test_counts_stay_in_each_group(group: int, swap: Callable[..., None]) -> None:
    v, w, a = problem(20, 32)
    after = v.clone()
    swap(after, w, a, group, 10, 16)
    assert torch.equal((after != 0).view(20, -1, group).sum(dim=2), (v != 0).view(20, -1, group).sum(dim=2))
    assert (errors(after, w, a) <= errors(v, w, a) * (1 + 1e-6)).all()
    assert not torch.equal(after, v)


@BOTH
def test_what_was_zero_in_the_dense_row_never_comes_back(swap: Callable[..., None]) -> None:
    v, w, a = problem(8, 32)
    w[:, ::3], v[:, ::3] = 0.0, 0.0
    after = v.clone()
    swap(after, w, a, 32, 10, 16)
    assert (after[:, ::3] == 0).all()
    assert torch.equal((after != 0).sum(dim=1), (v != 0).sum(dim=1))


@BOTH
def test_rows_with_nothing_to_swap_stay_as_they_are(swap: Callable[..., None]) -> None:
    v, w, a = problem(6, 32)
    v[0], v[1], w[2], v[2] = 0.0, w[1], 0.0, 0.0
    after = v.clone()
    swap(after, w, a, 32, 10, 16)
    assert torch.equal(after[:3], v[:3])
    assert not torch.equal(after[3:], v[3:])
