"""Swaps: the mask of another method is bettered, one pair of a row's weights at a time (SparseSwaps, 2025).

Legend: R rows (outputs), C columns (inputs).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from billhook.kernels.swaps import BAND_ROWS, swap_
from billhook.layerworkers.errors import OptionError
from billhook.layerworkers.methods.contract import Refinement, Solution, check_ridge, quadratic_sums
from billhook.layerworkers.patterns import NM, Pattern
from billhook.layerworkers.problem import LinearProblem, ridged_load
from billhook.layerworkers.statistics import GRAM


@dataclass(frozen=True)
class Options:
    """Options of the swaps."""

    ridge: float = 0.1
    """Added to the unit-diagonal Gram; at least 0."""
    swaps: int = 32
    """Swaps in a row at most."""

    def __post_init__(self) -> None:
        check_ridge(self.ridge)
        if self.swaps < 1:
            raise OptionError(f"swaps={self.swaps}: expected a number of swaps in a row, for example 32")


def refine(
    dense_RC: Tensor, solution: Solution, problem: LinearProblem, pattern: Pattern, options: Options
) -> Solution:
    """Swap a removed weight, which comes back as it was, for a kept one, as long as the row's error falls.

    The error is ``(v - v0) A (v - v0)^T``, V = W norms, A the unit-diagonal Gram with its ridge. Each row keeps its
    count, and each group of an N:M pattern too. Loss and energy are the errors, at the result and at zero.
    """
    form = problem.ridged(options.ridge)
    v0_RC, v_RC = dense_RC * form.norms_C, solution.weight_RC * form.norms_C
    group = pattern.group if isinstance(pattern, NM) else problem.columns
    swap_(v_RC, v0_RC, form.gram_CC, group, options.swaps, problem.partition_rows)
    back_RC = (solution.weight_RC == 0) & (v_RC != 0)
    weight_RC = torch.where(back_RC, dense_RC, solution.weight_RC).masked_fill_(v_RC == 0, 0.0)
    return replace(
        solution,
        weight_RC=weight_RC,
        loss=quadratic_sums(v_RC.sub_(v0_RC), form.gram_CC, problem.partition_rows),
        energy=quadratic_sums(v0_RC, form.gram_CC, problem.partition_rows),
    )


SWAPS = Refinement(
    name="swaps",
    source="SparseSwaps, 2025 (arXiv 2512.10922); the change of the error for weights that were updated is ours",
    summary="a better mask: pairs of weights of a row are swapped while its error falls",
    statistic=GRAM,
    fit="",
    options=Options,
    refine=refine,
    # the steps are no large products: a thousand of these take as long as one weight of one step
    flops=lambda rows, columns, options: rows * columns * (6.0 * columns + 1000 * options.swaps),
    launches=lambda columns, options: 200 * options.swaps,
    factor_flops=lambda columns: 0.0,
    shared=ridged_load,
    extra_bytes=lambda rows, columns: (26 * rows + 112 * min(rows, 2 * BAND_ROWS)) * columns,
    forms=frozenset({"ridged"}),
)
