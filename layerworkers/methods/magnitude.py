"""Magnitude pruning: the smallest weights of a linear go; no data is needed.

Legend: R rows (outputs), C columns (inputs).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from billhook.layerworkers.collective import Load
from billhook.layerworkers.methods.contract import Method, Solution, mask_by_score
from billhook.layerworkers.patterns import Selector
from billhook.layerworkers.problem import LinearProblem


@dataclass(frozen=True)
class Options:
    """Magnitude pruning has no options."""


def solve(weight_RC: Tensor, problem: LinearProblem, select: Selector, options: Options) -> Solution:
    """Remove the entries with the smallest ``|W_ij|``; survivors keep their values.

    The reported error is ``sum (W - W_hat)^2 / sum W^2``: that of white inputs.
    """
    return mask_by_score(weight_RC, weight_RC.abs(), select, problem.partition_rows)


MAGNITUDE = Method(
    name="magnitude",
    source="Han et al., Learning both Weights and Connections, NeurIPS 2015 (arXiv 1506.02626)",
    summary="smallest |W| of each linear; no calibration",
    statistic=None,
    within_rows=False,
    fit="lockstep",
    options=Options,
    solve=solve,
    selections=lambda columns, options: 1,
    flops=lambda rows, columns, options: 8.0 * rows * columns,
    launches=lambda columns, options: 20,
    factor_flops=lambda columns: 0.0,
    shared=lambda columns: Load(()),
    extra_bytes=lambda rows, columns: 22 * rows * columns,
)
