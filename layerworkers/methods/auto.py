"""The default: ADMM on targets that take back half of what the linears before got wrong.

A dense stream runs beside the sparse one (:mod:`billhook.layerworkers.lockstep`). Where the output of a linear is added
to the residual stream, its weights are fitted to half of the gap between the two streams, and elsewhere to half of that
between its inputs (:meth:`billhook.layerworkers.problem.LinearProblem.corrected`). Why half, and why ADMM:
``docs/decisions/0009-auto.md``.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from billhook.layerworkers.methods import admm


@dataclass(frozen=True)
class Options(admm.Options):
    """Those of ADMM; with fewer iterations, so that a block takes less than three times SparseGPT's time."""

    iterations: int = 12
    reselections: int = 9


AUTO = dataclasses.replace(
    admm.ADMM,
    name="auto",
    source=f"{admm.ADMM.source}; targets from a dense stream: billhook, docs/decisions/0009-auto.md",
    summary="admm on targets that take back half of the error of the linears before",
    options=Options,
    correction=0.5,
)
