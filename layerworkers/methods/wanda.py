"""Wanda: weights times the size of their inputs, compared within each row (Sun et al., ICLR 2024).

Legend: R rows (outputs), C columns (inputs).
"""

from __future__ import annotations

from dataclasses import dataclass

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
