"""Which worker solves which rows of the linears of an input group. Never changes bytes, only time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from billhook.kernels.products import row_partitions
from billhook.kernels.select import KEY_LEVELS
from billhook.layerworkers.collective import Rows
from billhook.layerworkers.methods import Method
from billhook.layerworkers.patterns import NM, Pattern
from billhook.layerworkers.reduction import even_ranges

FLOPS_PER_SECOND = 5e10
"""Rate of one worker that the choice between the two ways assumes: about that of one CPU core in float32."""
NEAR_EXCHANGE_SECONDS, FAR_EXCHANGE_SECONDS = 3e-4, 2e-3
"""Time of one exchange of small messages between the workers of one machine, and of several."""


@dataclass(frozen=True)
class Work:
    """A linear to be solved."""

    rows: int
    flops: float
    selections: int
    """Collective selections that are needed when the rows lie on several workers."""


def is_local(method: Method, pattern: Pattern) -> bool:
    """Whether a row is selected without a look at the others: then any rows can be solved by themselves."""
    return isinstance(pattern, NM) or method.within_rows


def work_of(method: Method, pattern: Pattern, options: Any, rows: int, columns: int) -> Work:
    """Return what solving a linear of this shape is.

    options: the method's own.
    """
    selections = 0 if is_local(method, pattern) else method.selections(columns, options)
    return Work(rows, method.flops(rows, columns, options), selections)


def share_out(linears: Sequence[Work], workers: int, partition_rows: int, exchange_seconds: float) -> list[list[Rows]]:
    """Return, for each linear, the rows of each worker, in the order of the workers.

    Either every linear is split by row partitions over all workers, or whole linears are dealt out, the largest
    first to the least loaded: whichever is estimated to end first. Row ranges are unions of row partitions.
    """
    split = [_split(work.rows, workers, partition_rows) for work in linears]
    dealt, dealt_flops = _deal(linears, workers)
    split_seconds = sum(
        work.flops * max(stop - start for start, stop in ranges) / work.rows / FLOPS_PER_SECOND
        + len(KEY_LEVELS) * work.selections * exchange_seconds * (workers > 1)
        for work, ranges in zip(linears, split, strict=True)
    )
    return split if split_seconds < dealt_flops / FLOPS_PER_SECOND else dealt


def share_out_stage(
    groups: Sequence[Sequence[Work]],
    shared_flops: Sequence[float],
    workers: int,
    partition_rows: int,
    exchange_seconds: float,
) -> list[list[list[Rows]]]:
    """Return, for each linear of each input group, the rows of each worker.

    A single group is shared out by :func:`share_out`. Several are dealt out whole, so that no worker waits for what
    another does with its own. shared_flops: of what the linears of each group share, its factorisation.
    """
    if len(groups) == 1 or workers == 1:
        return [share_out(own, workers, partition_rows, exchange_seconds) for own in groups]
    whole = [
        Work(1, sum(work.flops for work in group) + shared, 0)
        for group, shared in zip(groups, shared_flops, strict=True)
    ]
    dealt, _ = _deal(whole, workers)
    return [
        [[(0, work.rows if own != (0, 0) else 0) for own in owners] for work in group]
        for group, owners in zip(groups, dealt, strict=True)
    ]


def _split(rows: int, workers: int, partition_rows: int) -> list[Rows]:
    partitions = list(row_partitions(rows, partition_rows))
    return [
        (partitions[start][0], partitions[stop - 1][1]) if stop > start else (0, 0)
        for start, stop in even_ranges(len(partitions), workers)
    ]


def _deal(linears: Sequence[Work], workers: int) -> tuple[list[list[Rows]], float]:
    load = [0.0] * workers
    dealt: list[list[Rows]] = [[(0, 0)] * workers for _ in linears]
    for index in sorted(range(len(linears)), key=lambda i: -linears[i].flops):
        owner = load.index(min(load))
        load[owner] += linears[index].flops
        dealt[index][owner] = (0, linears[index].rows)
    return dealt, max(load)
