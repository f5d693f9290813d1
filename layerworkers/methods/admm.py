"""ADMM pruning: alternate between the least-squares weights and the nearest sparse ones (Boza, TMLR 2024).

Legend: R rows (outputs), C columns (inputs). The paper's matrices are transposed: rows of ours are its columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from billhook.kernels.products import matmul_by_rows
from billhook.layerworkers.errors import OptionError
from billhook.layerworkers.methods.contract import Method, Solution, check_ridge, partition_sums, quadratic_sums
from billhook.layerworkers.patterns import Selector
from billhook.layerworkers.problem import LinearProblem, normalised_load
from billhook.layerworkers.statistics import GRAM


@dataclass(frozen=True)
class Options:
    """Options of ADMM; the defaults are those of the author's code."""

    ridge: float = 0.1
    """Added to the unit-diagonal Gram: it pulls towards the dense weights, more where tokens are few; at least 0."""
    rho: float = 1.0
    """Penalty of the splitting; above 0."""
    iterations: int = 20
    """Iterations in all."""
    reselections: int = 15
    """Iterations that choose the mask anew; the later ones keep the last mask."""
    schedule: str = "constant"
    """``constant``: the mask has the asked sparsity from the first iteration; ``cubic``: it gets there by the last
    reselection, as the paper describes it."""

    def __post_init__(self) -> None:
        check_ridge(self.ridge)
        if not 0 < self.rho < float("inf"):
            raise OptionError(f"rho={self.rho}: expected a positive number, for example 1")
        if not 1 <= self.reselections <= self.iterations:
            raise OptionError(
                f"reselections={self.reselections}, iterations={self.iterations}: "
                "expected 1 <= reselections <= iterations"
            )
        if self.schedule not in ("constant", "cubic"):
            raise OptionError(f"schedule={self.schedule}: expected 'constant' or 'cubic'")


def solve(weight_RC: Tensor, problem: LinearProblem, select: Selector, options: Options) -> Solution:
    """Minimise ``tr((V - V0) A (V - V0)^T)`` over V with the asked zeros, V0 = W norms, A the ridged Gram.

    ``Z = P(V + U); U += V - Z; V = (V0 A + rho (Z - U)) (A + rho I)^-1`` where P keeps the largest entries of
    ``|V + U|`` (section 3 of the paper; the first choice is Wanda's score, compared over the whole linear).
    The mask has the asked sparsity from the first iteration, as in the author's released code, or, by the schedule of
    the paper, the share ``1 - (1 - t / reselections)^3`` of it in iteration t. Loss and energy are the objective, at
    the result and at zero.
    """
    form = problem.normalised(options.ridge, options.rho)
    v0_RC = weight_RC * form.norms_C
    target_RC = matmul_by_rows(v0_RC, form.gram_CC, problem.partition_rows)
    v_RC, u_RC = v0_RC.clone(), torch.zeros_like(v0_RC)
    prune_RC = torch.zeros_like(v0_RC, dtype=torch.bool)
    for iteration in range(options.iterations):
        u_RC += v_RC
        if iteration < options.reselections:
            left = 1 - Fraction(iteration + 1, options.reselections) if options.schedule == "cubic" else 0
            prune_RC = select.part(u_RC.abs(), Fraction(1 - left**3))
        z_RC = u_RC.masked_fill(prune_RC, 0.0)
        u_RC -= z_RC
        right_RC = z_RC.sub_(u_RC).mul_(options.rho).add_(target_RC)
        v_RC = matmul_by_rows(right_RC, form.inverse_CC, problem.partition_rows)
    z_RC = (v_RC + u_RC).masked_fill_(prune_RC, 0.0)
    return Solution(
        z_RC / form.norms_C,
        removed=int(prune_RC.sum()),
        loss=quadratic_sums(z_RC - v0_RC, form.gram_CC, problem.partition_rows),
        energy=partition_sums(target_RC * v0_RC, problem.partition_rows),
    )


ADMM = Method(
    name="admm",
    source="Boza, Fast and Effective Weight Update for Pruned LLMs, TMLR 2024 (arXiv 2401.02938), section 3",
    summary="alternating projections and least squares on the unit-diagonal Gram",
    statistic=GRAM,
    within_rows=False,
    fit="lockstep",
    options=Options,
    solve=solve,
    selections=lambda columns, options: options.reselections,
    flops=lambda rows, columns, options: 2.0 * rows * columns**2 * (options.iterations + 2),
    launches=lambda columns, options: 20 * options.iterations,
    factor_flops=lambda columns: columns**3,
    shared=normalised_load,
    extra_bytes=lambda rows, columns: 4 * columns**2 + 40 * rows * columns,
    forms=frozenset({"normalised"}),
)
