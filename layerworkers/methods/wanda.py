"""Wanda: weights times the size of their inputs, compared within each row (Sun et al., ICLR 2024).

Legend: R rows (outputs), C columns (inputs).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from billhook.layerworkers.methods.contract import Method, Solution, mask_by_score
from billhook.layerworkers.patterns import Selector
from billhook.layerworkers.problem import LinearProblem, column_squares_load
from billhook.layerworkers.statistics import COLUMN_SQUARES


@dataclass(frozen=True)
class Options:
    """Wanda has no options."""


def solve(weight_RC: Tensor, problem: LinearProblem, select: Selector, options: Options) -> Solution:
    """Remove the entries with the smallest ``S_ij = |W_ij| ||X_j||_2`` (equation 1); survivors keep their values.

    The reported error is ``sum (S_ij of what was removed)^2 / sum S_ij^2``: that of uncorrelated inputs.
    """
    score_RC = weight_RC.abs().mul_(problem.column_squares().sqrt())
    return mask_by_score(weight_RC, score_RC, select, problem.partition_rows)


def solve_cumulatively(weight_RC: Tensor, problem: LinearProblem, select: Selector, options: Options) -> Solution:
    """Remove what makes up the same share of each row's scores: rows whose scores are uneven lose more entries.

    An entry is compared, over the whole linear, by the sum of its row's scores up to its own, over the sum of all. The
    authors search for the share that comes within a thousandth of the sparsity asked (appendix on OPT, and
    ``--use_variant`` of their code); compared so, its count is exact. N:M patterns come out as Wanda's.
    """
    score_RC = weight_RC.abs().mul_(problem.column_squares().sqrt())
    ascending_RC, order_RC = score_RC.sort(dim=1, stable=True)
    running_RC = ascending_RC.double().cumsum(dim=1)
    share_RC = running_RC.div_(running_RC[:, -1:].clamp(min=torch.finfo(torch.float32).tiny)).float()
    prune_RC = select(torch.empty_like(score_RC).scatter_(1, order_RC, share_RC))
    return mask_by_score(weight_RC, score_RC, lambda _: prune_RC, problem.partition_rows)


def mask_with_gradients(
    weight_RC: Tensor, problem: LinearProblem, select: Selector, scaled: Callable[[Tensor, float], Tensor]
) -> Solution:
    """Remove the entries with the smallest ``S_ij = |W_ij| (||X_j||_2 + A_ij)``; the reported error is Wanda's.

    ``||X_j||`` is the root of the mean over samples of the squared norm. scaled: returns A [R, C], given mean squared
    gradients [R, C], which may be overwritten, and the number of samples.
    """
    squares_C, _, _, samples_C = problem.moments()
    norms_C = squares_C.div(samples_C.clamp(min=1)).sqrt_()
    magnitude_RC = weight_RC.abs()
    score_RC = scaled(problem.gradient_squares(), float(samples_C[0])).add_(norms_C).mul_(magnitude_RC)
    prune_RC = select(score_RC)
    return mask_by_score(weight_RC, magnitude_RC.mul_(norms_C), lambda _: prune_RC, problem.partition_rows)


WANDA = Method(
    name="wanda",
    source="Sun et al., A Simple and Effective Pruning Approach for LLMs, ICLR 2024 (arXiv 2306.11695), equation 1",
    summary="smallest |W| times input norm in each row; no update of the survivors",
    statistic=COLUMN_SQUARES,
    within_rows=True,
    fit="dense-block",
    options=Options,
    solve=solve,
    selections=lambda columns, options: 0,
    flops=lambda rows, columns, options: 10.0 * rows * columns,
    launches=lambda columns, options: 20,
    factor_flops=lambda columns: 0.0,
    shared=column_squares_load,
    extra_bytes=lambda rows, columns: 22 * rows * columns,
)

WANDA_CUMULATIVE = Method(
    name="wanda-cumulative",
    source="Sun et al., ICLR 2024 (arXiv 2306.11695), the variant of the appendix on OPT",
    summary="as wanda, but each row loses the same share of its summed scores, not of its entries",
    statistic=COLUMN_SQUARES,
    within_rows=False,
    fit="dense-block",
    options=Options,
    solve=solve_cumulatively,
    selections=lambda columns, options: 1,
    flops=lambda rows, columns, options: 60.0 * rows * columns,
    launches=lambda columns, options: 40,
    factor_flops=lambda columns: 0.0,
    shared=column_squares_load,
    extra_bytes=lambda rows, columns: 50 * rows * columns,
)
