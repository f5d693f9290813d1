"""Refit: the least-squares weights on the support that another method chose (Meng et al., ALPS, NeurIPS 2024).

Legend: R rows (outputs), C columns (inputs).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from billhook.kernels.factor import NotPositiveDefiniteError
from billhook.kernels.products import matmul_by_rows
from billhook.kernels.refit import refit_reference, refit_steps_
from billhook.layerworkers.errors import IllConditionedError, OptionError
from billhook.layerworkers.methods.contract import Refinement, Solution, check_ridge, quadratic_sums
from billhook.layerworkers.patterns import Pattern
from billhook.layerworkers.problem import LinearProblem, Ridged, ridged_load
from billhook.layerworkers.statistics import GRAM


@dataclass(frozen=True)
class Options:
    """Options of the refit by conjugate gradients."""

    ridge: float = 0.1
    """Added to the unit-diagonal Gram: it pulls towards the dense weights, more where tokens are few; at least 0."""
    refit_steps: int = 10
    """Steps of conjugate gradients."""

    def __post_init__(self) -> None:
        check_ridge(self.ridge)
        if self.refit_steps < 1:
            raise OptionError(f"refit_steps={self.refit_steps}: expected a number of steps, for example 10")


@dataclass(frozen=True)
class ExactOptions:
    """Options of the exact refit."""

    ridge: float = 0.1
    """As of the refit by conjugate gradients."""

    def __post_init__(self) -> None:
        check_ridge(self.ridge)


def refine(
    dense_RC: Tensor, solution: Solution, problem: LinearProblem, pattern: Pattern, options: Options
) -> Solution:
    """Step towards ``argmin tr((V - V0) A (V - V0)^T)`` on the support by conjugate gradients, from the weights given.

    V = W norms, A the unit-diagonal Gram with its ridge (section 3.2 of the paper, without its preconditioner, which
    is the identity here). Loss and energy are the objective, at the result and at zero.
    """
    form = problem.ridged(options.ridge)
    v0_RC, v_RC = dense_RC * form.norms_C, solution.weight_RC * form.norms_C

    def times_a(rows_RC: Tensor) -> Tensor:
        return matmul_by_rows(rows_RC, form.gram_CC, problem.partition_rows)

    refit_steps_(v_RC, v0_RC, solution.weight_RC != 0, times_a, options.refit_steps)
    return _refined(v_RC, v0_RC, solution, form, problem.partition_rows)


def refine_exactly(
    dense_RC: Tensor, solution: Solution, problem: LinearProblem, pattern: Pattern, options: ExactOptions
) -> Solution:
    """Solve for ``argmin tr((V - V0) A (V - V0)^T)`` on the support, row by row, in float64; see :func:`refine`."""
    form = problem.ridged(options.ridge)
    v0_RC = dense_RC * form.norms_C
    try:
        v_RC = refit_reference(v0_RC.double(), solution.weight_RC != 0, form.gram_CC.double()).float()
    except NotPositiveDefiniteError as error:
        raise IllConditionedError(
            "the Gram matrix of a row's support is not positive definite; raise the ridge"
        ) from error
    return _refined(v_RC, v0_RC, solution, form, problem.partition_rows)


def _refined(v_RC: Tensor, v0_RC: Tensor, solution: Solution, form: Ridged, partition_rows: int) -> Solution:
    return replace(
        solution,
        weight_RC=torch.where(solution.weight_RC != 0, v_RC / form.norms_C, 0.0),
        loss=quadratic_sums(v_RC - v0_RC, form.gram_CC, partition_rows),
        energy=quadratic_sums(v0_RC, form.gram_CC, partition_rows),
    )


REFIT = Refinement(
    name="refit",
    source="Meng et al., ALPS, NeurIPS 2024 (arXiv 2406.07831), section 3.2",
    summary="least-squares weights on the support that was chosen, by conjugate gradients",
    statistic=GRAM,
    fit="lockstep",
    options=Options,
    refine=refine,
    flops=lambda rows, columns, options: 2.0 * rows * columns**2 * (options.refit_steps + 3),
    launches=lambda columns, options: 15 * options.refit_steps + 20,
    factor_flops=lambda columns: 0.0,
    shared=ridged_load,
    extra_bytes=lambda rows, columns: 30 * rows * columns,
    forms=frozenset({"ridged"}),
)

EXACT_REFIT = Refinement(
    name="exact-refit",
    source="the normal equations of each row; the limit of 'refit'",
    summary="least-squares weights on the support that was chosen, row by row: slow, for comparison",
    statistic=GRAM,
    fit="lockstep",
    options=ExactOptions,
    refine=refine_exactly,
    flops=lambda rows, columns, options: rows * columns**3 / 12,
    launches=lambda columns, options: 10,
    factor_flops=lambda columns: 0.0,
    shared=ridged_load,
    extra_bytes=lambda rows, columns: 32 * columns**2 + 30 * rows * columns,
    forms=frozenset({"ridged"}),
)
