"""The smallest sum of the linears' relative errors within the budget, by Lagrange's multiplier."""

from __future__ import annotations

import numpy as np

from billhook.orchestrator.allocation.contract import Evidence, NoOptions, below


def error_knapsack(evidence: Evidence, sparsity: float, options: NoOptions) -> list[float]:
    """Return the sparsities ``s_l`` with the smallest ``sum_l E_l(s_l)`` of all that add up to what is asked.

    ``E_l(s)`` is the relative squared error of a linear's output without the share s of its entries that have the
    smallest Wanda scores, for uncorrelated inputs: their squared scores over all squared scores. It is convex, so those
    steps on its way to 1 are taken whose error for each entry is smallest: one threshold for all linears.
    """
    facts = {each.name: each for block in evidence.scores(1.0) for each in block}
    entries, slopes = [], []
    for matrix in evidence.matrices:
        lost = np.array(facts[matrix.name].lost)
        step = matrix.size / (len(lost) - 1)
        entries.append(np.full(len(lost) - 1, step))
        slopes.append(np.diff(lost) / step)
    return below(entries, slopes, sparsity)
