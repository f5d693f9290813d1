"""Conjugate gradients against the normal equations, in float64 and in float32."""

from __future__ import annotations

import pytest
import torch

from billhook.kernels.factor import NotPositiveDefiniteError
from billhook.kernels.refit import refit_reference, refit_steps_


def problem(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    x = torch.randn(4 * columns, columns, generator=generator, dtype=torch.float64)
    a = x.T @ x
    norms = a.diagonal().sqrt()
    a = a / norms / norms[:, None] + 0.1 * torch.eye(columns)
    v0 = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return v0, torch.rand(rows, columns, generator=generator) < 0.5, a


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 7), (5, 40)])
def test_the_reference_fulfils_the_normal_equations(rows: int, columns: int) -> None:
    v0, keep, a = problem(rows, columns)
    fitted = refit_reference(v0, keep, a)
    assert (fitted[~keep] == 0).all()
    assert float((((fitted - v0) @ a)[keep]).abs().sum()) < 1e-10


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 7), (5, 40)])
def test_enough_steps_arrive_at_the_reference(rows: int, columns: int) -> None:
    v0, keep, a = problem(rows, columns)
    v = (v0 * keep).float()
    refit_steps_(v, v0.float(), keep, lambda each: each @ a.float(), columns)
    assert torch.allclose(v.double(), refit_reference(v0, keep, a), rtol=1e-5, atol=1e-5)


def test_no_step_raises_the_objective() -> None:
    v0, keep, a = problem(6, 50)
    before = torch.full((6,), torch.inf, dtype=torch.float64)
    for steps in range(12):
        v = v0 * keep
        refit_steps_(v, v0, keep, lambda each: each @ a, steps)
        objective = (((v - v0) @ a) * (v - v0)).sum(dim=1)
        assert (objective <= before * (1 + 1e-12)).all()
        before = objective


def test_rows_without_support_or_already_there_stay() -> None:
    v0, keep, a = problem(3, 9)
    keep[0] = False
    keep[1] = True
    v = v0 * keep
    refit_steps_(v, v0, keep, lambda each: each @ a, 20)
    assert (v[0] == 0).all()
    assert torch.equal(v[1], v0[1])


def test_a_support_that_is_not_positive_definite_is_an_error() -> None:
    with pytest.raises(NotPositiveDefiniteError):
        refit_reference(torch.ones(1, 2), torch.ones(1, 2, dtype=torch.bool), torch.tensor([[1.0, 2.0], [2.0, 1.0]]))
