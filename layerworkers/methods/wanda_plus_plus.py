"""Wanda++: Wanda's scores and gradients of the block's output, in rounds (Yang et al., Findings of ACL 2025).

Legend: R rows (outputs), C columns (inputs).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from billhook.layerworkers.errors import OptionError
from billhook.layerworkers.methods.contract import Method, Rounds, Solution
from billhook.layerworkers.methods.wanda import mask_with_gradients
from billhook.layerworkers.patterns import Selector
from billhook.layerworkers.problem import LinearProblem, moments_load
from billhook.layerworkers.statistics import MOMENTS


@dataclass(frozen=True)
class Options:
    """Options of Wanda++."""

    alpha: float = 100.0
    """What the gradient is multiplied by; 0: Wanda's scores."""
    rounds: int = 5
    """How often the block is pruned and tuned before it is pruned for good; 0: not at all."""
    round_samples: int = 32
    """Calibration samples, the first so many, that it is tuned on."""
    rate: float = 3e-7
    """Learning rate of RMSprop in the rounds."""

    def __post_init__(self) -> None:
        if not 0 <= self.alpha < math.inf:
            raise OptionError(f"alpha={self.alpha}: expected a number of at least 0, for example 100")
        if self.rounds < 0:
            raise OptionError(f"rounds={self.rounds}: expected at least 0, for example 5")
        if self.round_samples < 1:
            raise OptionError(f"round_samples={self.round_samples}: expected at least 1, for example 32")
        if not 0 <= self.rate < 1:
            raise OptionError(f"rate={self.rate}: expected a number from 0 to below 1, for example 3e-7")


def solve(weight_RC: Tensor, problem: LinearProblem, select: Selector, options: Options) -> Solution:
    """Remove the entries with the smallest ``S_ij = (alpha G_ij + ||X_j||_2) |W_ij|`` (equation 4) in each row.

    G is the root mean square over samples of the gradient of ``||f(X_n)||_2``, f being the dense block, and ``||X_j||``
    the root of the mean over samples of the squared norm, as in Wanda's code: alpha depends on it. The reported error
    is Wanda's, ``sum (|W_ij| ||X_j|| of what was removed)^2 / sum (|W_ij| ||X_j||)^2``.
    """
    return mask_with_gradients(
        weight_RC, problem, select, lambda squares_RC, samples: squares_RC.sqrt_().mul_(options.alpha)
    )


WANDA_PLUS_PLUS = Method(
    name="wanda++",
    source="Yang et al., Wanda++, Findings of ACL 2025 (arXiv 2503.04992), equations 4 and 5",
    summary="wanda with gradients of the block's output in the score, in rounds of pruning and slight tuning",
    statistic=MOMENTS,
    within_rows=True,
    fit="dense-block",
    options=Options,
    solve=solve,
    selections=lambda columns, options: 0,
    flops=lambda rows, columns, options: 12.0 * rows * columns,
    launches=lambda columns, options: 25,
    factor_flops=lambda columns: 0.0,
    shared=moments_load,
    extra_bytes=lambda rows, columns: 26 * rows * columns,
    rounds=lambda options: Rounds(options.rounds, options.round_samples, options.rate),
)
