"""DSnoT: weights come back and others go, until a row's outputs have the right mean (Zhang et al., ICLR 2024).

Legend: R rows (outputs), C columns (inputs).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from billhook.layerworkers.errors import OptionError
from billhook.layerworkers.methods.contract import Refinement, Solution, partition_sums
from billhook.layerworkers.patterns import NM, Pattern
from billhook.layerworkers.problem import LinearProblem, moments_load
from billhook.layerworkers.statistics import MOMENTS


@dataclass(frozen=True)
class Options:
    """Options of DSnoT; the defaults are those of the authors' code."""

    cycles: int = 50
    """Exchanges in a row at most."""
    threshold: float = 0.1
    """Expected error of a row's output, summed over a sample, up to which nothing is exchanged; at least 0."""

    def __post_init__(self) -> None:
        if self.cycles < 1:
            raise OptionError(f"cycles={self.cycles}: expected a number of exchanges, for example 50")
        if not 0 <= self.threshold < float("inf"):
            raise OptionError(f"threshold={self.threshold}: expected a number of at least 0, for example 0.1")


def refine(
    dense_RC: Tensor, solution: Solution, problem: LinearProblem, pattern: Pattern, options: Options
) -> Solution:
    """Exchange a removed weight for a kept one, row by row, while the expected error of the output falls.

    The error of a row is ``eps = sum of w_j m_j over what is removed``, m_j being the mean over samples of the sum of
    channel j. Of the removed weights, that with the largest ``w_j m_j / var_j`` in the direction of eps comes back
    (section 3.2 of the paper); of the kept ones whose removal moves eps towards zero, that with the smallest
    ``|w_j| ||X_j||`` goes (in the same group, for N:M). An exchange that would leave a larger error is not made, and
    ends the row; the authors' code makes it. The variances are of all tokens, theirs the mean of each sample's. The
    reported error is Wanda's.
    """
    squares_C, sums_C, tokens_C, samples_C = problem.moments()
    tokens_C = tokens_C.clamp(min=1.0)
    variance_C = (squares_C / tokens_C - (sums_C / tokens_C).square()).clamp_(min=1e-12)
    moved_RC = dense_RC * (sums_C / samples_C.clamp(min=1.0))
    score_RC = dense_RC.abs() * squares_C.sqrt()
    columns = dense_RC.shape[1]
    group_C = torch.arange(columns, device=dense_RC.device) // (pattern.group if isinstance(pattern, NM) else columns)
    removed_RC = solution.weight_RC == 0
    dense_zero_RC = dense_RC == 0
    error_R = torch.where(removed_RC, moved_RC, 0.0).sum(dim=1)
    rows_R = torch.arange(len(dense_RC), device=dense_RC.device)
    active_R = torch.ones_like(error_R, dtype=torch.bool)
    for _ in range(options.cycles):
        sign_R = torch.where(error_R > 0, 1.0, -1.0)
        active_R &= error_R.abs() > options.threshold
        toward_RC = moved_RC * sign_R[:, None]
        back_RC = (toward_RC / variance_C).masked_fill(~removed_RC | dense_zero_RC, -torch.inf)
        back_R = back_RC.argmax(dim=1)
        allowed_RC = ~removed_RC & (toward_RC < 0) & (group_C == group_C[back_R][:, None])
        away_R = score_RC.masked_fill(~allowed_RC, torch.inf).argmin(dim=1)
        after_R = error_R - moved_RC[rows_R, back_R] + moved_RC[rows_R, away_R]
        active_R &= (back_RC[rows_R, back_R] > -torch.inf) & allowed_RC[rows_R, away_R]
        active_R &= after_R.abs() < error_R.abs()
        if not active_R.any():
            break
        error_R = torch.where(active_R, after_R, error_R)
        removed_RC[rows_R[active_R], back_R[active_R]] = False
        removed_RC[rows_R[active_R], away_R[active_R]] = True
    squares_RC = score_RC.square_()
    return replace(
        solution,
        weight_RC=dense_RC.masked_fill(removed_RC, 0.0),
        loss=partition_sums(squares_RC.masked_fill(~removed_RC, 0.0), problem.partition_rows),
        energy=partition_sums(squares_RC, problem.partition_rows),
    )


DSNOT = Refinement(
    name="dsnot",
    source="Zhang et al., Dynamic Sparse No Training, ICLR 2024 (arXiv 2310.08915), section 3.2",
    summary="exchanges of weights of a row until its outputs have the right mean",
    statistic=MOMENTS,
    fit="",
    options=Options,
    refine=refine,
    flops=lambda rows, columns, options: 15.0 * rows * columns * options.cycles,
    launches=lambda columns, options: 30 * options.cycles,
    factor_flops=lambda columns: 0.0,
    shared=moments_load,
    extra_bytes=lambda rows, columns: 40 * rows * columns,
    forms=frozenset(),
)
