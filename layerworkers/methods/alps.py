"""ALPS: splitting with a penalty that grows until the mask stands still, then a refit (Meng et al., NeurIPS 2024).

Legend: R rows (outputs), C columns (inputs).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from billhook.kernels.refit import refit_steps_
from billhook.layerworkers.errors import OptionError
from billhook.layerworkers.methods.contract import Method, Solution, check_ridge, check_steps, partition_sums
from billhook.layerworkers.patterns import Selector
from billhook.layerworkers.problem import LinearProblem, spectral_load
from billhook.layerworkers.statistics import GRAM

CHECK_EVERY = 3
"""Iterations from one look at the mask to the next."""


@dataclass(frozen=True)
class Options:
    """Options of ALPS; the penalties are those of the authors' code."""

    ridge: float = 0.1
    """Added to the unit-diagonal Gram: it pulls towards the dense weights, more where tokens are few; at least 0."""
    rho: float = 0.1
    """Penalty of the splitting at first; above 0."""
    iterations: int = 60
    """Iterations at most."""
    refit_steps: int = 10
    """Steps of conjugate gradients on the last mask."""

    def __post_init__(self) -> None:
        check_ridge(self.ridge)
        if not 0 < self.rho < float("inf"):
            raise OptionError(f"rho={self.rho}: expected a positive number, for example 0.1")
        check_steps(self.iterations, self.refit_steps, CHECK_EVERY)


def solve(weight_RC: Tensor, problem: LinearProblem, select: Selector, options: Options) -> Solution:
    """Minimise ``tr((V - V0) A (V - V0)^T)`` over V with the asked zeros, V0 = W norms, A the ridged Gram.

    ``B = (V0 A - Y + rho D) (A + rho I)^-1; D = P(B + Y / rho); Y += rho (B - D)`` (Algorithm 1 of the paper), P
    keeping the largest entries. Every third time rho grows, by 1.3 where more than a tenth of the kept entries have
    changed, by 1.2 where more than a two-hundredth, by 1.1 where any; where none has, B's largest entries are the
    support, which conjugate gradients refit. The ridge is added to the unit-diagonal Gram; the authors' code adds it
    before, where the largest channels drown it. Loss and energy are the objective, at the result and at zero.
    """
    form = problem.spectral(options.ridge)

    def times(rows_RC: Tensor, of_value: Callable[[Tensor], Tensor]) -> Tensor:
        return form.times(rows_RC, of_value, problem.partition_rows)

    v0_RC = weight_RC * form.norms_C
    target_RC = times(v0_RC, lambda value: value)
    d_RC, y_RC = v0_RC.clone(), torch.zeros_like(v0_RC)
    kept_RC, rho, b_RC = torch.ones_like(v0_RC, dtype=torch.bool), options.rho, v0_RC
    kept = max(1, select.count(kept_RC) - select.to_remove(v0_RC))
    for iteration in range(1, options.iterations + 1):
        b_RC = times(d_RC.mul_(rho).sub_(y_RC).add_(target_RC), partial(_shifted_inverse, rho))
        d_RC = b_RC + y_RC / rho
        prune_RC = select(d_RC.abs())
        d_RC.masked_fill_(prune_RC, 0.0)
        y_RC.add_(b_RC - d_RC, alpha=rho)
        if iteration % CHECK_EVERY == 0:
            changed = select.count(kept_RC == prune_RC)
            kept_RC = prune_RC.logical_not()
            if changed == 0:
                break
            rho *= 1.3 if changed > 0.1 * kept else 1.2 if changed > 0.005 * kept else 1.1
    prune_RC = select(b_RC.abs())
    v_RC = b_RC.masked_fill(prune_RC, 0.0)
    refit_steps_(
        *(v_RC, v0_RC, prune_RC.logical_not(), lambda rows_RC: times(rows_RC, lambda value: value)),
        options.refit_steps,
    )
    change_RC = v_RC - v0_RC
    return Solution(
        v_RC / form.norms_C,
        removed=int(prune_RC.count_nonzero()),
        loss=partition_sums(times(change_RC, lambda value: value).mul_(change_RC), problem.partition_rows),
        energy=partition_sums(target_RC * v0_RC, problem.partition_rows),
    )


def _shifted_inverse(rho: float, value_C: Tensor) -> Tensor:
    return 1 / (value_C + rho)


ALPS = Method(
    name="alps",
    source="Meng et al., ALPS, NeurIPS 2024 (arXiv 2406.07831), Algorithm 1",
    summary="alternating projections with a growing penalty on the unit-diagonal Gram, then a refit",
    statistic=GRAM,
    within_rows=False,
    fit="lockstep",
    options=Options,
    solve=solve,
    selections=lambda columns, options: options.iterations + 1,
    flops=lambda rows, columns, options: 4.0 * rows * columns**2 * (options.iterations + options.refit_steps + 3),
    launches=lambda columns, options: 25 * options.iterations + 20 * options.refit_steps,
    factor_flops=lambda columns: 9.0 * columns**3,
    shared=spectral_load,
    extra_bytes=lambda rows, columns: 36 * columns**2 + 44 * rows * columns,
    forms=frozenset({"spectral"}),
    counts=lambda columns, options: 2 + options.iterations // CHECK_EVERY,
    adaptive=True,
)
