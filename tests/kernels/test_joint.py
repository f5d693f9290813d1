"""The joint removal against the least squares that it solves, and its loop against the reference."""

from __future__ import annotations

import pytest
import torch

from billhook.kernels.factor import NotPositiveDefiniteError, upper_factor_reference
from billhook.kernels.joint import _multipliers, multipliers_reference, remove_jointly_


def problem(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    x = torch.randn(3 * columns, columns, generator=generator, dtype=torch.float64)
    w = torch.randn(rows, columns, generator=generator)
    return w, x.T @ x, torch.rand(rows, columns, generator=generator) < 0.5


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 7), (70, 40)])
def test_what_is_left_is_the_least_squares_fit(rows: int, columns: int) -> None:
    w, h, prune = problem(rows, columns)
    updated = w.clone()
    error = remove_jointly_(updated, upper_factor_reference(h).float(), prune, 16)
    assert (updated[prune] == 0).all()
    gradient = (updated.double() - w) @ h
    assert float(gradient[~prune].abs().sum()) <= 1e-3 * float(gradient.abs().sum())
    change = updated.double() - w
    assert torch.allclose(error.double().square().sum(dim=1), ((change @ h) * change).sum(dim=1), rtol=1e-3)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 33), (130, 64)])
def test_the_loop_agrees_with_the_reference(rows: int, columns: int) -> None:
    w, h, prune = problem(rows, columns)
    prune[0] = True
    prune[-1] = False
    k = torch.linalg.inv(h)
    assert torch.allclose(_multipliers(w, k, prune), multipliers_reference(w, k, prune), rtol=1e-5, atol=1e-6)


def test_a_channel_that_weighs_nothing_changes_no_other() -> None:
    w, h, _ = problem(4, 6)
    u = upper_factor_reference(h).float()
    u[2, :], u[:, 2], u[2, 2] = 0.0, 0.0, torch.inf
    prune = torch.zeros(4, 6, dtype=torch.bool)
    prune[:, 2] = True
    updated = w.clone()
    error = remove_jointly_(updated, u, prune, 16)
    assert (updated[:, 2] == 0).all()
    assert torch.equal(updated[:, [0, 1, 3, 4, 5]], w[:, [0, 1, 3, 4, 5]])
    assert torch.isfinite(error).all()


def test_what_is_not_positive_definite_is_an_error() -> None:
    w, prune = torch.ones(1, 2), torch.ones(1, 2, dtype=torch.bool)
    k = torch.tensor([[1.0, 2.0], [2.0, 1.0]], dtype=torch.float64)
    for solve in (_multipliers, multipliers_reference):
        with pytest.raises(NotPositiveDefiniteError):
            solve(w, k, prune)
