"""Net-Trim: the weights of least 1-norm whose outputs stay near the dense ones (Aghasi et al., 2017 and 2020).

Legend: R rows (outputs), C columns (inputs).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from billhook.kernels.products import matmul_by_rows
from billhook.kernels.refit import refit_steps_
from billhook.layerworkers.errors import OptionError
from billhook.layerworkers.methods.contract import Method, Solution, check_ridge, check_steps, partition_sums
from billhook.layerworkers.patterns import Selector
from billhook.layerworkers.problem import LinearProblem, spectral_load
from billhook.layerworkers.statistics import GRAM


@dataclass(frozen=True)
class Options:
    """Options of Net-Trim."""

    ridge: float = 0.1
    """Added to the unit-diagonal Gram: it pulls towards the dense weights, more where tokens are few; at least 0."""
    tolerance: float = 0.1
    """Distance from a row's dense outputs, over their size, that the sparse ones may have; between 0 and 1."""
    iterations: int = 50
    """Iterations of the splitting."""
    refit_steps: int = 10
    """Steps of conjugate gradients on the mask."""

    def __post_init__(self) -> None:
        check_ridge(self.ridge)
        if not 0 < self.tolerance < 1:
            raise OptionError(f"tolerance={self.tolerance}: expected a number between 0 and 1, for example 0.1")
        check_steps(self.iterations, self.refit_steps)


def solve(weight_RC: Tensor, problem: LinearProblem, select: Selector, options: Options) -> Solution:
    """Minimise ``||V||_1`` with ``||(V - V0) A^(1/2)|| <= tolerance ||V0 A^(1/2)||`` in each row; keep what is largest.

    V0 = W norms, A the ridged Gram: the programme of the paper without its rectifier, which needs only the
    Gram. It is solved by splitting, with V in the coordinates of A's eigenvectors, where ``A^(1/2)`` is diagonal:

        V = argmin ||(V - V0) A^(1/2) - Y + S||^2 + ||V - Z + T||^2
        Y = (V - V0) A^(1/2) + S in the ball;  Z = soft(V + T);  S += (V - V0) A^(1/2) - Y;  T += V - Z

    The programme leaves the sparsity open; the largest entries of Z, and of V where these do not suffice, are kept, as
    many as asked, and refitted by conjugate gradients. Loss and energy are the objective
    ``tr((V - V0) A (V - V0)^T)``, at the result and at zero.
    """
    form = problem.spectral(options.ridge)
    root_C = form.values_C.sqrt()

    def rotated(rows_RC: Tensor) -> Tensor:
        return matmul_by_rows(rows_RC, form.vectors_CC, problem.partition_rows)

    def back(rows_RC: Tensor) -> Tensor:
        return matmul_by_rows(rows_RC, form.vectors_CC.T, problem.partition_rows)

    v0_RC = weight_RC * form.norms_C
    dense_RC = rotated(v0_RC).mul_(root_C)
    radius_R1 = options.tolerance * dense_RC.norm(dim=1, keepdim=True)
    threshold_R1 = v0_RC.abs().mean(dim=1, keepdim=True)
    v_RC, z_RC = v0_RC, v0_RC.clone()
    y_RC, s_RC, t_RC = torch.zeros_like(v0_RC), torch.zeros_like(v0_RC), torch.zeros_like(v0_RC)
    for _ in range(options.iterations):
        right_RC = (dense_RC + y_RC - s_RC).mul_(root_C).add_(rotated(z_RC - t_RC))
        rotated_RC = right_RC.div_(form.values_C + 1)
        v_RC = back(rotated_RC)
        s_RC += rotated_RC.mul_(root_C).sub_(dense_RC)
        y_RC = s_RC * (radius_R1 / s_RC.norm(dim=1, keepdim=True).clamp(min=1e-30)).clamp_(max=1.0)
        s_RC -= y_RC
        t_RC += v_RC
        z_RC = t_RC.sign() * (t_RC.abs() - threshold_R1).clamp_(min=0.0)
        t_RC -= z_RC
    prune_RC = select(z_RC.abs().add_(v_RC.abs(), alpha=1e-6))
    v_RC = v0_RC.masked_fill(prune_RC, 0.0)

    def times_a(rows_RC: Tensor) -> Tensor:
        return form.times(rows_RC, lambda value: value, problem.partition_rows)

    refit_steps_(v_RC, v0_RC, prune_RC.logical_not(), times_a, options.refit_steps)
    change_RC = v_RC - v0_RC
    return Solution(
        v_RC / form.norms_C,
        removed=int(prune_RC.count_nonzero()),
        loss=partition_sums(times_a(change_RC).mul_(change_RC), problem.partition_rows),
        energy=partition_sums(dense_RC.square_(), problem.partition_rows),
    )


NET_TRIM = Method(
    name="net-trim",
    source="Aghasi et al., Fast Convex Pruning of Deep Neural Networks, SIMODS 2020 (arXiv 1806.06457)",
    summary="least 1-norm within a distance from the dense outputs, then the largest entries, then a refit",
    statistic=GRAM,
    within_rows=False,
    fit="lockstep",
    options=Options,
    solve=solve,
    selections=lambda columns, options: 1,
    flops=lambda rows, columns, options: 4.0 * rows * columns**2 * (options.iterations + options.refit_steps + 3),
    launches=lambda columns, options: 30 * options.iterations + 20 * options.refit_steps,
    factor_flops=lambda columns: 9.0 * columns**3,
    shared=spectral_load,
    extra_bytes=lambda rows, columns: 36 * columns**2 + 60 * rows * columns,
    forms=frozenset({"spectral"}),
)
