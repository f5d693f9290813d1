"""The compiled swaps against the formula, and the formula against the error that it predicts."""

from __future__ import annotations

import pytest
import torch

from billhook.kernels.swaps import swap_, swap_reference_


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


@pytest.mark.parametrize("updated", [False, True])
@pytest.mark.parametrize(
    ("rows", "columns", "group"), [(1, 4, 4), (5, 33, 33), (4, 96, 96), (6, 64, 4), (3, 30, 3), (2, 80, 40)]
)
def test_the_loop_swaps_as_the_reference_does(rows: int, columns: int, group: int, updated: bool) -> None:
    v, w, a = problem(rows, columns, updated)
    for limit in (1, 2, 7):
        fast, slow = v.clone(), v.clone()
        swap_(fast, w, a, group, limit)
        swap_reference_(slow, w, a, group, limit)
        assert torch.equal(fast, slow)


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
        swap_(v, w, a, 12, 1)
        assert float(errors(v, w, a)) == pytest.approx(min(before, *candidates.values()), rel=1e-4)
        if min(candidates.values()) >= before:
            return
    raise AssertionError("it never ended")


@pytest.mark.parametrize("group", [4, 32])
def test_counts_stay_in_each_group(group: int) -> None:
    v, w, a = problem(20, 32)
    after = v.clone()
    swap_(after, w, a, group, 10)
    assert torch.equal((after != 0).view(20, -1, group).sum(dim=2), (v != 0).view(20, -1, group).sum(dim=2))
    assert (errors(after, w, a) <= errors(v, w, a) * (1 + 1e-6)).all()
    assert not torch.equal(after, v)


def test_what_was_zero_in_the_dense_row_never_comes_back() -> None:
    v, w, a = problem(8, 32)
    w[:, ::3], v[:, ::3] = 0.0, 0.0
    after = v.clone()
    swap_(after, w, a, 32, 10)
    assert (after[:, ::3] == 0).all()
    assert torch.equal((after != 0).sum(dim=1), (v != 0).sum(dim=1))
