"""GBLM-Pruner: Wanda's scores and the gradients of the whole model's loss (Das et al., arXiv 2311.04902).

Legend: R rows (outputs), C columns (inputs).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from billhook.layerworkers.errors import OptionError
from billhook.layerworkers.methods.contract import Method, Solution
from billhook.layerworkers.methods.wanda import mask_with_gradients
from billhook.layerworkers.patterns import Selector
from billhook.layerworkers.problem import LinearProblem, moments_load
from billhook.layerworkers.statistics import MOMENTS


@dataclass(frozen=True)
class Options:
    """Options of GBLM."""

    alpha: float = 100.0
    """What the gradient is multiplied by; 0: Wanda's scores."""
    gradient_samples: int = 128
    """Calibration samples, the first so many, whose gradients are taken."""

    def __post_init__(self) -> None:
        if not 0 <= self.alpha < math.inf:
            raise OptionError(f"alpha={self.alpha}: expected a number of at least 0, for example 100")
        if self.gradient_samples < 1:
            raise OptionError(f"gradient_samples={self.gradient_samples}: expected at least 1, for example 128")


def solve(weight_RC: Tensor, problem: LinearProblem, select: Selector, options: Options) -> Solution:
    """Remove the entries with the smallest ``S_ij = |W_ij| (||X_j||_2 + alpha sqrt(sum_n g_nij^2))`` in each row.

    g_n is the gradient of the dense model's mean cross-entropy of sample n (equation 4, with the 2-norm over samples),
    and ``||X_j||`` the root of the mean over samples of the squared norm, as in the authors' code: alpha depends on it,
    and on the number of samples. The reported error is Wanda's, ``sum (|W_ij| ||X_j|| of what was removed)^2 / sum
    (|W_ij| ||X_j||)^2``.
    """

    def scaled(squares_RC: Tensor, samples: float) -> Tensor:
        return squares_RC.mul_(min(options.gradient_samples, samples)).sqrt_().mul_(options.alpha)

    return mask_with_gradients(weight_RC, problem, select, scaled)


GBLM = Method(
    name="gblm",
    source="Das et al., Beyond Size: How Gradients Shape Pruning Decisions in LLMs, 2023 (arXiv 2311.04902), eq. 4",
    summary="wanda with gradients of the whole model's loss in the score, from a pass forward and back",
    statistic=MOMENTS,
    within_rows=True,
    fit="dense-block",
    options=Options,
    solve=solve,
    selections=lambda columns, options: 0,
    flops=lambda rows, columns, options: 13.0 * rows * columns,
    launches=lambda columns, options: 28,
    factor_flops=lambda columns: 0.0,
    shared=moments_load,
    extra_bytes=lambda rows, columns: 34 * rows * columns,
    model_gradients=lambda options: options.gradient_samples,
)
