"""The smallest sum of the linears' relative errors within the budget, by Lagrange's multiplier."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from billhook.orchestrator.allocation.contract import Evidence, below, check_spread


@dataclass(frozen=True)
class KnapsackOptions:
    """Options of the knapsack."""

    spread: float = 0.1
    """How much sparser or denser than all together a linear may be; between 0 and 0.5."""

    def __post_init__(self) -> None:
        check_spread(self.spread)


def error_knapsack(evidence: Evidence, sparsity: float, options: KnapsackOptions) -> list[float]:
    """Return the sparsities ``s_l`` with the smallest ``sum_l E_l(s_l)`` of all that add up to what is asked.

    ``E_l(s)`` is the relative squared error of a linear's output without the share s of its entries that have the
    smallest Wanda scores, for uncorrelated inputs: their squared scores over all squared scores. It is convex, so those
    steps on its way to 1 are taken whose error for each entry is smallest: one threshold for all linears. Steps that
    end below what a linear is to lose at least are taken in any case, those that begin above what it may lose are not.
    """
    facts = {each.name: each for block in evidence.scores(1.0) for each in block}
    entries, slopes = [], []
    for matrix in evidence.matrices:
        lost = np.array(facts[matrix.name].lost)
        ends = np.linspace(0, 1, len(lost))
        step = matrix.size / (len(lost) - 1)
        slope = np.diff(lost) / step
        slope[ends[1:] <= sparsity - options.spread + 1e-9] = -1.0
        slope[ends[:-1] >= sparsity + options.spread - 1e-9] = np.inf
        entries.append(np.full(len(lost) - 1, step))
        slopes.append(slope)
    return below(entries, slopes, sparsity)
