"""What a pruning method declares and returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from billhook.kernels.products import matmul_by_rows, row_partitions
from billhook.kernels.select import zero_where_
from billhook.layerworkers.collective import Load
from billhook.layerworkers.errors import OptionError
from billhook.layerworkers.patterns import Pattern, Selector
from billhook.layerworkers.problem import LinearProblem
from billhook.layerworkers.statistics import Statistic


@dataclass(frozen=True)
class Solution:
    """The sparse rows of a linear, and how far they are from the dense ones."""

    weight_RC: Tensor
    """[R, C] float32; removed entries are 0."""
    removed: int
    """Entries that were chosen to be removed."""
    loss: list[float]
    """Squared error of the rows' outputs, one sum per row partition, in the units of ``energy``."""
    energy: list[float]
    """Squared size of the dense rows' outputs, one sum per row partition; ``loss / energy`` is the relative error."""


@dataclass(frozen=True)
class Rounds:
    """How often a block is pruned and tuned before it is pruned for good: see :mod:`billhook.layerworkers.regional`."""

    count: int
    samples: int
    """Of the calibration samples, the first so many, on which it is tuned."""
    rate: float
    """Of RMSprop."""


@dataclass(frozen=True)
class Alternation:
    """How a block's feed-forward network is pruned: see :func:`billhook.layerworkers.auxiliaries.alternate`."""

    epochs: int
    alpha: float = 1.0
    beta: float = 1.0
    gamma: float = 1.0
    ridge: float = 0.001
    """Added to the unit-diagonal Gram where linears are refitted."""


@dataclass(frozen=True)
class Method:
    """One row of the table of methods."""

    name: str
    source: str
    """Paper and equation."""
    summary: str
    statistic: Statistic | None
    within_rows: bool
    """Whether unstructured selection compares each row by itself rather than the whole linear."""
    fit: str
    """``lockstep`` or ``dense-block``: which inputs a linear is fitted to where the recipe leaves it to the method."""
    options: type[Any]
    """A frozen dataclass of the method's own options, each a number or string with a default."""
    solve: Callable[[Tensor, LinearProblem, Selector, Any], Solution]
    selections: Callable[[int, Any], int]
    """``selections(columns, options)``: collective selections in one unstructured solve."""
    flops: Callable[[int, int, Any], float]
    """``flops(rows, columns, options)`` of one solve, without the factorisation."""
    launches: Callable[[int, Any], int]
    """``launches(columns, options)``: about how many kernels a solve launches on a GPU, one after the other."""
    factor_flops: Callable[[int], float]
    """``factor_flops(columns)`` of what the linears with one input share."""
    shared: Callable[[int], Load]
    """``shared(columns)``: what of that each further worker that solves them is sent."""
    extra_bytes: Callable[[int, int], int]
    """``extra_bytes(rows, columns)`` held during a solve beside the float32 weight and the statistic."""
    forms: frozenset[str] = frozenset()
    """What the Gram is made into: questions to the problem that would each overwrite it."""
    counts: Callable[[int, Any], int] = lambda columns, options: 0
    """``counts(columns, options)``: sums of one number over all workers in one unstructured solve."""
    correction: float = 0.0
    """Share of the deviation from the dense model that targets take back where the recipe leaves it to the method."""
    rounds: Callable[[Any], Rounds] | None = None
    """``rounds(options)`` of a method that asks for the gradients of the block's output; None: it does not."""
    model_gradients: Callable[[Any], int] | None = None
    """``model_gradients(options)``: on how many samples, the first ones, a method asks for the gradients of the model's
    loss; None: it does not."""
    alternation: Callable[[Any], Alternation] | None = None
    """``alternation(options)`` of a method that prunes the linears of a feed-forward network once more, together."""
    adaptive: bool = False
    """Whether the data decide how many selections and counts there are; those declared are then the most."""


@dataclass(frozen=True)
class Solver:
    """What a linear is solved by."""

    method: Method
    options: Any
    """The method's own."""


@dataclass(frozen=True)
class Refinement:
    """What can be done to the result of a method: one row of the table of refinements.

    What is zero before is zero afterwards, or as many others are: in the row, and for N:M in the group. Rows are
    refined by themselves.
    """

    name: str
    source: str
    summary: str
    statistic: Statistic
    fit: str
    """As a method's; empty: that of the method before."""
    options: type[Any]
    """As a method's. An option that several parts of a chain have is one and the same."""
    refine: Callable[[Tensor, Solution, LinearProblem, Pattern, Any], Solution]
    """``refine(dense_RC, solution, problem, pattern, options)``; what the solution holds may be overwritten."""
    flops: Callable[[int, int, Any], float]
    launches: Callable[[int, Any], int]
    factor_flops: Callable[[int], float]
    shared: Callable[[int], Load]
    extra_bytes: Callable[[int, int], int]
    forms: frozenset[str]


def mask_by_score(
    weight_RC: Tensor, score_RC: Tensor, select: Callable[[Tensor], Tensor], partition_rows: int
) -> Solution:
    """Remove the entries with the smallest scores; survivors keep their values.

    weight_RC: [R, C] float32; score_RC: [R, C] float32, at least 0; both are overwritten. Loss and energy are the
    squared scores of what is removed, and of all.
    """
    prune_RC = select(score_RC)
    squares_RC = score_RC.square_()
    energy = partition_sums(squares_RC, partition_rows)
    zero_where_(weight_RC, prune_RC)
    removed = int(prune_RC.count_nonzero())
    zero_where_(squares_RC, prune_RC.logical_not_())
    return Solution(weight_RC, removed, partition_sums(squares_RC, partition_rows), energy)


def quadratic_sums(change_RC: Tensor, gram_CC: Tensor, partition_rows: int) -> list[float]:
    """Return ``tr(D A D^T)`` of the rows D [R, C] of each row partition, A being ``gram_CC``."""
    return partition_sums(matmul_by_rows(change_RC, gram_CC, partition_rows).mul_(change_RC), partition_rows)


def partition_sums(values_RC: Tensor, partition_rows: int) -> list[float]:
    """Sum the rows of ``values_RC``, and these sums, in float64, over each row partition."""
    sums_R = values_RC.sum(dim=1).double()
    return [float(sums_R[start:stop].sum()) for start, stop in row_partitions(len(values_RC), partition_rows)]


def check_steps(iterations: int, refit_steps: int, least: int = 1) -> None:
    """Check the options of methods that iterate and then refit.

    Raises:
        InputError: when there are fewer iterations than ``least``, or fewer steps than none.
    """
    if iterations < least or refit_steps < 0:
        raise OptionError(
            f"iterations={iterations}, refit_steps={refit_steps}: expected at least {least} and at least 0"
        )


def check_ridge(ridge: float) -> None:
    """Check the option that several methods share.

    Raises:
        InputError: when it is negative or not finite.
    """
    if not 0 <= ridge < float("inf"):
        raise OptionError(f"ridge={ridge}: expected a number of at least 0, for example 0.1")
