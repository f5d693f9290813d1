"""One linear solved by a method that asks for gradients, by one worker."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from billhook.layerworkers.collective import Alone
from billhook.layerworkers.methods import METHODS
from billhook.layerworkers.patterns import Selector
from billhook.layerworkers.problem import LinearProblem


def solved(method: str, options: dict[str, Any], squares: Tensor, pattern: Any) -> Tensor:
    """Return 24 rows of 32 weights after a method was told of these mean squared gradients [24, 32]."""
    generator = torch.Generator().manual_seed(1)
    x_TC, weight_RC = torch.randn(64, 32, generator=generator), torch.randn(24, 32, generator=generator)
    chosen = METHODS[method]
    total = torch.zeros(chosen.statistic.shape(32))  # type: ignore[union-attr]
    for sample in x_TC.view(4, 16, 32):
        chosen.statistic.add(total, sample, None)  # type: ignore[union-attr]
    problem = LinearProblem(total, 32, 8, Alone(), torch.device("cpu"))
    problem.turn_to(weight_RC, lambda first, last: squares[first:last].clone())
    select = Selector(pattern, chosen.within_rows, Alone())
    return chosen.solve(weight_RC.clone(), problem, select, chosen.options(**options)).weight_RC
