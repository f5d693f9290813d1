"""The sweeps agree with their references: the compiled loop, and Triton's kernel under its interpreter."""

import os
from typing import Any

import pytest
import torch
from torch import Tensor

os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined

from billhook.kernels import sweep_triton
from billhook.kernels.factor import upper_factor_reference
from billhook.kernels.gram import gram_reference
from billhook.kernels.sweep import sweep_groups, sweep_groups_reference, sweep_masked, sweep_masked_reference


def triton_masked(w: Tensor, u: Tensor, prune: Tensor) -> Tensor:
    return sweep_triton.sweep(w, u, prune, 0, w.shape[1])


def triton_groups(w: Tensor, u: Tensor, keep: int, group: int) -> Tensor:
    return sweep_triton.sweep(w, u, torch.zeros_like(w, dtype=torch.bool), group - keep, group)


MASKED = pytest.mark.parametrize("masked", [sweep_masked, triton_masked])
GROUPS = pytest.mark.parametrize("groups", [sweep_groups, triton_groups])


def block(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(rows * 1000 + columns)
    x = torch.randn(4 * columns, columns) @ (torch.eye(columns) + 0.3 * torch.randn(columns, columns))
    factor = upper_factor_reference(gram_reference(x) + 0.1 * torch.eye(columns))
    return torch.randn(rows, columns), factor.float().contiguous()


@MASKED
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 8), (5, 3), (33, 128), (130, 40)])
def test_the_masked_sweep_agrees_with_the_reference(masked: Any, rows: int, columns: int) -> None:
    w, u = block(rows, columns)
    prune = torch.rand(rows, columns) < 0.5
    fast, oracle = w.clone(), w.double()
    error = masked(fast, u, prune)
    expected_error = sweep_masked_reference(oracle, u.double(), prune)
    scale = float(oracle.abs().max()) + 1.0
    assert torch.allclose(fast.double(), oracle, rtol=1e-5, atol=1e-5 * scale)
    assert torch.allclose(error.double(), expected_error, rtol=1e-4, atol=1e-5 * float(expected_error.abs().max() + 1))
    assert (fast[prune] == 0).all()
    assert (error[~prune] == 0).all()


@GROUPS
@pytest.mark.parametrize(("keep", "group"), [(2, 4), (4, 8), (1, 4), (3, 4), (8, 8), (1, 2), (2, 6), (5, 7)])
def test_the_group_sweep_agrees_with_the_reference(groups: Any, keep: int, group: int) -> None:
    w, u = block(37, 5 * group)
    fast, reference = w.clone(), w.clone()
    error, expected_error = groups(fast, u, keep, group), sweep_groups_reference(reference, u, keep, group)
    assert torch.equal(fast == 0, reference == 0)
    assert torch.allclose(fast, reference, rtol=1e-4, atol=1e-5)
    assert torch.allclose(error, expected_error, rtol=1e-4, atol=1e-4)
    assert ((fast.view(37, 5, group) == 0).sum(dim=2) == group - keep).all()


@GROUPS
def test_ties_in_a_group_go_by_index(groups: Any) -> None:
    w = torch.ones(2, 4)
    groups(w, torch.eye(4), 2, 4)
    assert torch.equal(w, torch.tensor([[0.0, 0.0, 1.0, 1.0]] * 2))


@pytest.mark.parametrize("sweep", [sweep_masked, triton_masked, sweep_masked_reference])
def test_an_infinite_diagonal_is_a_channel_that_weighs_nothing(sweep: Any) -> None:
    w, u = torch.ones(2, 4), torch.eye(4)
    u[2, 2] = torch.inf
    error = sweep(w, u, torch.tensor([[False, False, True, False], [True, False, False, False]]))
    assert torch.equal(error, torch.tensor([[0.0, 0, 0, 0], [1, 0, 0, 0]]))
    assert torch.equal(w, torch.tensor([[1.0, 1, 0, 1], [0, 1, 1, 1]]))


@pytest.mark.parametrize("sweep", [sweep_groups, triton_groups, sweep_groups_reference])
def test_channels_that_weigh_nothing_go_first_in_their_group(sweep: Any) -> None:
    w, u = torch.ones(1, 4), torch.eye(4)
    u[1, 1] = u[2, 2] = torch.inf
    sweep(w, u, 3, 4)
    assert torch.equal(w, torch.tensor([[1.0, 0, 1, 1]]))


@MASKED
def test_rows_do_not_depend_on_each_other(masked: Any) -> None:
    w, u = block(90, 66)
    prune = torch.rand(90, 66) < 0.5
    whole, halves = w.clone(), w.clone()
    masked(whole, u, prune)
    for part in (slice(0, 7), slice(7, 90)):
        rows = halves[part].clone()
        masked(rows, u, prune[part])
        halves[part] = rows
    assert torch.equal(whole, halves)


def test_tiles_and_passes_change_no_bit() -> None:
    """The loop makes each update in the order of the columns, as this does, one entry at a time."""
    w, u = block(70, 67)
    prune = torch.rand(70, 67) < 0.5
    fast = w.clone()
    sweep_masked(fast, u, prune)
    for j in range(67):
        e = torch.where(prune[:, j], w[:, j] / u[j, j], 0.0)
        for t in range(j + 1, 67):
            w[:, t] -= e * u[j, t]
        w[:, j].masked_fill_(prune[:, j], 0.0)
    assert torch.equal(fast, w)
