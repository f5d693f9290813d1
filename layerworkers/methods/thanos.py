"""Thanos: what is removed of a row in a block of columns is removed at once, not column by column (Ilin, 2025).

Legend: R rows (outputs), C columns (inputs), B columns of the block at hand.
"""

from __future__ import annotations

from torch import Tensor

from billhook.kernels.factor import NotPositiveDefiniteError
from billhook.kernels.joint import remove_jointly_
from billhook.layerworkers.errors import IllConditionedError
from billhook.layerworkers.methods.contract import Method, Solution, partition_sums
from billhook.layerworkers.methods.sparsegpt import Options, block_columns, damped_energy, update_right_
from billhook.layerworkers.patterns import NM, Selector
from billhook.layerworkers.problem import LinearProblem, column_squares_load, inverse_factor_load
from billhook.layerworkers.statistics import GRAM


def solve(weight_RC: Tensor, problem: LinearProblem, select: Selector, options: Options) -> Solution:
    """Remove, block by block, the entries with the smallest ``|W_ij| ||X_j||``, and update all that is right of them.

    Compared are all columns that are left, over all rows, for as many entries as are still to go; those of them that
    lie in the block go now (Algorithm 1 of the paper). The update is the best for all of a row's entries together:
    with the factor U of SparseGPT, the inverse Hessian of the columns that are left is ``U^T U`` of the trailing
    corner, so none is inverted anew. For N:M each group is chosen by the same score, in all rows: the authors' code
    leaves a tenth of the rows dense.

    Loss and energy are SparseGPT's.
    """
    norms_C = problem.column_squares().sqrt()
    factor_CC = problem.inverse_factor(options.damping)
    energy = damped_energy(weight_RC, factor_CC, problem.partition_rows)
    squared_error_R1 = weight_RC.new_zeros(len(weight_RC), 1)
    columns, width = weight_RC.shape[1], block_columns(select.pattern, options)
    removed, left = 0, select.to_remove(weight_RC)
    for start in range(0, columns, width):
        stop = min(start + width, columns)
        if isinstance(select.pattern, NM):
            prune_RB = select(weight_RC[:, start:stop].abs() * norms_C[start:stop])
        else:
            prune_RB = select.smallest(weight_RC[:, start:].abs() * norms_C[start:], left)[:, : stop - start]
            left -= select.count(prune_RB)
        removed += int(prune_RB.count_nonzero())
        block_RB, corner_BB = weight_RC[:, start:stop].clone(), factor_CC[start:stop, start:stop]
        try:
            error_RB = remove_jointly_(block_RB, corner_BB, prune_RB, problem.partition_rows)
        except NotPositiveDefiniteError as error:
            raise IllConditionedError(
                "what is removed of a row cannot be made up for in float64; raise the damping"
            ) from error
        weight_RC[:, start:stop] = block_RB
        squared_error_R1 += update_right_(weight_RC, error_RB, factor_CC, stop, problem.partition_rows)
    return Solution(weight_RC, removed, partition_sums(squared_error_R1 / 2, problem.partition_rows), energy)


THANOS = Method(
    name="thanos",
    source="Ilin, Thanos: A Block-wise Pruning Algorithm, 2025 (arXiv 2504.05346), Algorithm 1",
    summary="Wanda's mask over what is left, block by block, with the best update for all that goes at once",
    statistic=GRAM,
    within_rows=False,
    fit="lockstep",
    options=Options,
    solve=solve,
    selections=lambda columns, options: -(-columns // options.block),
    flops=lambda rows, columns, options: rows * columns * (2.0 * columns + options.block**2),
    launches=lambda columns, options: 200 * -(-columns // options.block),
    factor_flops=lambda columns: 2.0 / 3.0 * columns**3,
    shared=lambda columns: column_squares_load(columns) + inverse_factor_load(columns),
    extra_bytes=lambda rows, columns: 26 * rows * columns,
    forms=frozenset({"inverse factor"}),
    counts=lambda columns, options: 1 + -(-columns // options.block),
)
