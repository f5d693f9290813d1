"""Iterative hard thresholding of the layer's least-squares problem, in the manner of CHITA (Benbaki et al., ICML 2023).

Legend: R rows (outputs), C columns (inputs).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from billhook.kernels.products import matmul_by_rows
from billhook.kernels.refit import refit_steps_
from billhook.layerworkers.methods.contract import Method, Solution, check_ridge, check_steps, quadratic_sums
from billhook.layerworkers.patterns import Selector
from billhook.layerworkers.problem import LinearProblem, ridged_load
from billhook.layerworkers.statistics import GRAM


@dataclass(frozen=True)
class Options:
    """Options of iterative hard thresholding."""

    ridge: float = 0.1
    """Added to the unit-diagonal Gram: it pulls towards the dense weights, more where tokens are few; at least 0."""
    iterations: int = 30
    """Gradient steps, each with a choice of the mask."""
    refit_steps: int = 10
    """Steps of conjugate gradients on the last mask."""

    def __post_init__(self) -> None:
        check_ridge(self.ridge)
        check_steps(self.iterations, self.refit_steps)


def solve(weight_RC: Tensor, problem: LinearProblem, select: Selector, options: Options) -> Solution:
    """Minimise ``tr((V - V0) A (V - V0)^T)`` over V with the asked zeros, V0 = W norms, A the ridged Gram.

    ``V <- P(V - eta (V - V0) A)``: P keeps the largest entries, and eta is the step that is best for the row on the
    support that it has (CHITA, arXiv 2302.14623, section 3.1, on the layer's Gram instead of the network's Fisher
    matrix). The last support is refitted by conjugate gradients. Loss and energy are the objective, at the result and
    at zero.
    """
    form = problem.ridged(options.ridge)

    def times_a(rows_RC: Tensor) -> Tensor:
        return matmul_by_rows(rows_RC, form.gram_CC, problem.partition_rows)

    v0_RC = weight_RC * form.norms_C
    prune_RC = select(v0_RC.abs())
    v_RC = v0_RC.masked_fill(prune_RC, 0.0)
    for _ in range(options.iterations):
        gradient_RC = times_a(v_RC - v0_RC)
        on_support_RC = gradient_RC.masked_fill(prune_RC, 0.0)
        square_R1 = on_support_RC.square().sum(dim=1, keepdim=True)
        curvature_R1 = (times_a(on_support_RC) * on_support_RC).sum(dim=1, keepdim=True)
        v_RC -= torch.where(curvature_R1 > 0, square_R1 / curvature_R1, 1.0) * gradient_RC
        prune_RC = select(v_RC.abs())
        v_RC.masked_fill_(prune_RC, 0.0)
    refit_steps_(v_RC, v0_RC, prune_RC.logical_not(), times_a, options.refit_steps)
    return Solution(
        v_RC / form.norms_C,
        removed=int(prune_RC.count_nonzero()),
        loss=quadratic_sums(v_RC - v0_RC, form.gram_CC, problem.partition_rows),
        energy=quadratic_sums(v0_RC, form.gram_CC, problem.partition_rows),
    )


IHT = Method(
    name="iht",
    source="Benbaki et al., CHITA, ICML 2023 (arXiv 2302.14623), section 3.1, on the layer's least-squares problem",
    summary="gradient steps and hard thresholds on the unit-diagonal Gram, then a refit",
    statistic=GRAM,
    within_rows=False,
    fit="lockstep",
    options=Options,
    solve=solve,
    selections=lambda columns, options: options.iterations + 1,
    flops=lambda rows, columns, options: 2.0 * rows * columns**2 * (2 * options.iterations + options.refit_steps + 3),
    launches=lambda columns, options: 30 * options.iterations + 15 * options.refit_steps,
    factor_flops=lambda columns: 0.0,
    shared=ridged_load,
    extra_bytes=lambda rows, columns: 40 * rows * columns,
    forms=frozenset({"ridged"}),
)
