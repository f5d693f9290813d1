"""SparseGPT: column by column, the survivors to the right make up for what was removed (Frantar & Alistarh, ICML 2023).

Legend: R rows (outputs), C columns (inputs), B columns of the block at hand.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from billhook.kernels.products import row_partitions
from billhook.kernels.sweep import sweep_groups, sweep_masked
from billhook.layerworkers.errors import OptionError
from billhook.layerworkers.methods.contract import Method, Solution, partition_sums
from billhook.layerworkers.patterns import NM, Pattern, Selector, refuse_nan
from billhook.layerworkers.problem import LinearProblem, inverse_factor_load
from billhook.layerworkers.statistics import GRAM


@dataclass(frozen=True)
class Options:
    """Options of SparseGPT."""

    damping: float = 0.01
    """Share of the mean of the Gram's diagonal that is added to the diagonal; finite and above 0."""
    block: int = 128
    """Columns that are selected together and updated before the rest; for N:M, rounded to a multiple of M."""

    def __post_init__(self) -> None:
        if not 0 < self.damping < float("inf"):
            raise OptionError(f"damping={self.damping}: expected a positive number, for example 0.01")
        if self.block < 1:
            raise OptionError(f"block={self.block}: expected a number of columns, for example 128")


def block_columns(pattern: Pattern, options: Options) -> int:
    """Return the block's width: ``options.block``, or for N:M the multiple of M nearest below it (at least M)."""
    if isinstance(pattern, NM):
        return max(pattern.group, options.block - options.block % pattern.group)
    return options.block


def solve(weight_RC: Tensor, problem: LinearProblem, select: Selector, options: Options) -> Solution:
    """Remove, in each block of columns, the entries with the smallest ``w_j^2 / U_jj^2``, and update those right of it.

    U is the upper factor of the inverse of the damped Gram (Algorithm 1 of the paper). Each block of columns loses the
    asked share over all rows. A dead channel scores 0, and what is kept of it keeps its value: the paper's code sets
    the whole column to zero instead, which may remove more than was asked.

    The loss is the paper's: ``sum e_j^2 / 2`` over the errors of the sweep, which equals ``tr(D H D^T) / 2`` with D the
    change of the weights and H the damped Gram; the energy is ``tr(W H W^T) / 2``.
    """
    factor_CC = problem.inverse_factor(options.damping)
    energy = damped_energy(weight_RC, factor_CC, problem.partition_rows)
    squared_error_R1 = weight_RC.new_zeros(len(weight_RC), 1)
    removed = 0
    columns, width = weight_RC.shape[1], block_columns(select.pattern, options)
    for start in range(0, columns, width):
        stop = min(start + width, columns)
        block_RB = weight_RC[:, start:stop].clone()
        corner_BB = factor_CC[start:stop, start:stop].contiguous()
        if isinstance(select.pattern, NM):
            error_RB = sweep_groups(block_RB, corner_BB, select.pattern.keep, select.pattern.group)
            refuse_nan(error_RB)
            refuse_nan(block_RB)
            removed += int(select.pattern.sparsity * block_RB.numel())
        else:
            prune_RB = select((block_RB / corner_BB.diagonal().contiguous()).square_())
            error_RB = sweep_masked(block_RB, corner_BB, prune_RB)
            removed += int(prune_RB.count_nonzero())
        weight_RC[:, start:stop] = block_RB
        squared_error_R1 += update_right_(weight_RC, error_RB, factor_CC, stop, problem.partition_rows)
    return Solution(weight_RC, removed, partition_sums(squared_error_R1 / 2, problem.partition_rows), energy)


def update_right_(weight_RC: Tensor, error_RB: Tensor, factor_CC: Tensor, stop: int, partition_rows: int) -> Tensor:
    """Make up for the errors of a block of columns right of it: ``W_R <- W_R - E U_BR``; return ``sum E^2``, [R, 1].

    stop: the first column right of the block, which is as wide as ``error_RB`` [R, B].
    """
    start = stop - error_RB.shape[1]
    squared_error_R1 = weight_RC.new_empty(len(weight_RC), 1)
    for first, last in row_partitions(len(error_RB), partition_rows):
        squared_error_R1[first:last] = error_RB[first:last].square().sum(dim=1, keepdim=True)
        if stop < weight_RC.shape[1]:
            weight_RC[first:last, stop:].addmm_(error_RB[first:last], factor_CC[start:stop, stop:], alpha=-1)
    return squared_error_R1


def damped_energy(weight_RC: Tensor, factor_CC: Tensor, partition_rows: int) -> list[float]:
    """Return ``tr(W H W^T) / 2`` per row partition: with ``H^-1 = U^T U``, W H W^T is the square of ``W U^-1``."""
    return [
        float(
            torch.linalg.solve_triangular(factor_CC, weight_RC[start:stop], upper=True, left=False)
            .square_()
            .sum(dim=1)
            .double()
            .sum()
        )
        / 2
        for start, stop in row_partitions(len(weight_RC), partition_rows)
    ]


SPARSEGPT = Method(
    name="sparsegpt",
    source="Frantar & Alistarh, SparseGPT, ICML 2023 (arXiv 2301.00774), Algorithm 1",
    summary="column sweep with error feedback through the inverse Hessian",
    statistic=GRAM,
    within_rows=False,
    fit="lockstep",
    options=Options,
    solve=solve,
    selections=lambda columns, options: -(-columns // options.block),
    flops=lambda rows, columns, options: 2.0 * rows * columns**2,
    launches=lambda columns, options: 30 * -(-columns // options.block),
    factor_flops=lambda columns: 2.0 / 3.0 * columns**3,
    shared=inverse_factor_load,
    extra_bytes=lambda rows, columns: 4 * rows * columns,
    forms=frozenset({"inverse factor"}),
)
