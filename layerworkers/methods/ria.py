"""RIA: a weight's share of its row and of its column, times the size of its input (Zhang et al., ICLR 2024).

Legend: R rows (outputs), C columns (inputs).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from billhook.layerworkers.errors import OptionError
from billhook.layerworkers.methods.contract import Method, Solution, mask_by_score
from billhook.layerworkers.patterns import Selector
from billhook.layerworkers.problem import LinearProblem, column_squares_load
from billhook.layerworkers.statistics import COLUMN_SQUARES


@dataclass(frozen=True)
class Options:
    """Options of RIA."""

    exponent: float = 0.5
    """Power of the input norm; at least 0."""

    def __post_init__(self) -> None:
        if not 0 <= self.exponent < float("inf"):
            raise OptionError(f"exponent={self.exponent}: expected a number of at least 0, for example 0.5")


def solve(weight_RC: Tensor, problem: LinearProblem, select: Selector, options: Options) -> Solution:
    """Remove the entries with the smallest ``(|W_ij| / sum_i |W_ij| + |W_ij| / sum_j |W_ij|) ||X_j||^exponent``.

    They are compared over the linear, as in the authors' code. Survivors keep their values. Channels are not permuted.
    The reported error is ``sum (|W_ij| ||X_j|| of what was removed)^2 / sum (|W_ij| ||X_j||)^2``.
    """
    magnitude_RC = weight_RC.abs()
    norms_C = problem.column_squares().sqrt()
    of_column_C = _shares(problem.column_magnitudes())
    of_row_R1 = _shares(magnitude_RC.sum(dim=1, keepdim=True))
    score_RC = (magnitude_RC * of_column_C).addcmul_(magnitude_RC, of_row_R1).mul_(norms_C**options.exponent)
    prune_RC = select(score_RC)
    return mask_by_score(weight_RC, magnitude_RC.mul_(norms_C), lambda _: prune_RC, problem.partition_rows)


def _shares(sums: Tensor) -> Tensor:
    return torch.where(sums > 0, 1 / sums, 0.0)


RIA = Method(
    name="ria",
    source="Zhang et al., Plug-and-Play: An Efficient Post-training Pruning Method for LLMs, ICLR 2024, equation 4",
    summary="share of |W| in its row and column, times a power of the input norm; no update of the survivors",
    statistic=COLUMN_SQUARES,
    within_rows=False,
    fit="dense-block",
    options=Options,
    solve=solve,
    selections=lambda columns, options: 1,
    flops=lambda rows, columns, options: 16.0 * rows * columns,
    launches=lambda columns, options: 30,
    factor_flops=lambda columns: 0.0,
    shared=column_squares_load,
    extra_bytes=lambda rows, columns: 26 * rows * columns,
)
