"""What ``billhook collect`` is to the plan: a method that wants every statistic and solves nothing."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from billhook.layerworkers.collective import Load
from billhook.layerworkers.methods.contract import Method, Solution
from billhook.layerworkers.patterns import Selector
from billhook.layerworkers.problem import LinearProblem
from billhook.layerworkers.statistics import GRAM_AND_MOMENTS


@dataclass(frozen=True)
class Options:
    """There are none."""


def solve(weight_RC: Tensor, problem: LinearProblem, select: Selector, options: Options) -> Solution:
    """Never called: see :meth:`billhook.layerworkers.worker.BlockWorker.collect_block`."""
    raise AssertionError("statistics are collected, and nothing is solved")


COLLECT = Method(
    name="collect",
    source="",
    summary="the statistics of every input are kept, and no weight is changed",
    statistic=GRAM_AND_MOMENTS,
    within_rows=True,
    fit="dense-block",
    options=Options,
    solve=solve,
    selections=lambda columns, options: 0,
    flops=lambda rows, columns, options: 0.0,
    launches=lambda columns, options: 0,
    factor_flops=lambda columns: 0.0,
    shared=lambda columns: Load(()),
    extra_bytes=lambda rows, columns: 0,
)
