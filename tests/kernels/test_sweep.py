from typing import Any

import pytest
import torch

from billhook.kernels.factor import upper_factor_reference
from billhook.kernels.gram import gram_reference
from billhook.kernels.sweep import sweep_groups, sweep_groups_reference, sweep_masked, sweep_masked_reference


def block(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(rows * 1000 + columns)
    x = torch.randn(4 * columns, columns) @ (torch.eye(columns) + 0.3 * torch.randn(columns, columns))
    factor = upper_factor_reference(gram_reference(x) + 0.1 * torch.eye(columns))
    return torch.randn(rows, columns), factor.float()


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 8), (5, 3), (33, 128), (256, 40)])
def test_the_compiled_masked_sweep_agrees_with_the_reference(rows: int, columns: int) -> None:
    w, u = block(rows, columns)
    prune = torch.rand(rows, columns) < 0.5
    fast, oracle = w.clone(), w.double()
    error = sweep_masked(fast, u, prune)
    expected_error = sweep_masked_reference(oracle, u.double(), prune)
    scale = float(oracle.abs().max()) + 1.0
    assert torch.allclose(fast.double(), oracle, rtol=1e-5, atol=1e-5 * scale)
    assert torch.allclose(error.double(), expected_error, rtol=1e-4, atol=1e-5 * float(expected_error.abs().max() + 1))
    assert (fast[prune] == 0).all()
    assert (error[~prune] == 0).all()


@pytest.mark.parametrize(("keep", "group"), [(2, 4), (4, 8), (1, 4), (3, 4), (8, 8)])
def test_the_compiled_group_sweep_agrees_with_the_reference(keep: int, group: int) -> None:
    w, u = block(37, 5 * group)
    fast, reference = w.clone(), w.clone()
    error, expected_error = sweep_groups(fast, u, keep, group), sweep_groups_reference(reference, u, keep, group)
    assert torch.equal(fast == 0, reference == 0)
    assert torch.allclose(fast, reference, rtol=1e-4, atol=1e-5)
    assert torch.allclose(error, expected_error, rtol=1e-4, atol=1e-4)
    assert ((fast.view(37, 5, group) == 0).sum(dim=2) == group - keep).all()


def test_ties_in_a_group_go_by_index() -> None:
    w = torch.ones(2, 4)
    sweep_groups(w, torch.eye(4), 2, 4)
    assert torch.equal(w, torch.tensor([[0.0, 0.0, 1.0, 1.0]] * 2))


@pytest.mark.parametrize("sweep", [sweep_masked, sweep_masked_reference])
def test_an_infinite_diagonal_is_a_channel_that_weighs_nothing(sweep: Any) -> None:
    w, u = torch.ones(2, 4), torch.eye(4)
    u[2, 2] = torch.inf
    error = sweep(w, u, torch.tensor([[False, False, True, False], [True, False, False, False]]))
    assert torch.equal(error, torch.tensor([[0.0, 0, 0, 0], [1, 0, 0, 0]]))
    assert torch.equal(w, torch.tensor([[1.0, 1, 0, 1], [0, 1, 1, 1]]))


@pytest.mark.parametrize("sweep", [sweep_groups, sweep_groups_reference])
def test_channels_that_weigh_nothing_go_first_in_their_group(sweep: Any) -> None:
    w, u = torch.ones(1, 4), torch.eye(4)
    u[1, 1] = u[2, 2] = torch.inf
    sweep(w, u, 3, 4)
    assert torch.equal(w, torch.tensor([[1.0, 0, 1, 1]]))


def test_rows_do_not_depend_on_each_other() -> None:
    w, u = block(20, 64)
    prune = torch.rand(20, 64) < 0.5
    whole, halves = w.clone(), w.clone()
    sweep_masked(whole, u, prune)
    for part in (slice(0, 7), slice(7, 20)):
        rows = halves[part].clone()
        sweep_masked(rows, u, prune[part])
        halves[part] = rows
    assert torch.equal(whole, halves)
