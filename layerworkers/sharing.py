"""Which worker solves which rows of the linears of an input group. Never changes bytes, only time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import Any

from billhook.kernels.products import row_partitions
from billhook.kernels.select import KEY_LEVELS
from billhook.layerworkers.collective import Load, Rows
from billhook.layerworkers.methods import Method
from billhook.layerworkers.patterns import NM, Pattern, PerRow
from billhook.layerworkers.problem import correction_flops, correction_load
from billhook.layerworkers.reduction import even_ranges

CPU_FLOPS_PER_SECOND, GPU_FLOPS_PER_SECOND = 5e10, 2e13
"""Rate of one worker in float32: about that of one CPU core, and half of what a data centre's GPU promises."""
NEAR_EXCHANGE_SECONDS, FAR_EXCHANGE_SECONDS = 3e-4, 2e-3
"""Time of one exchange of small messages between the workers of one machine, and of several."""
NEAR_BYTES_PER_SECOND, FAR_BYTES_PER_SECOND = 1e9, 2e9
"""Rate of large ones, into or out of a worker."""


@dataclass(frozen=True)
class Pace:
    """What a choice assumes of the workers: the same on all of them, since all have to choose alike."""

    flops_per_second: float = CPU_FLOPS_PER_SECOND
    """Of one worker, in float32."""
    exchange_seconds: float = FAR_EXCHANGE_SECONDS
    """Of one exchange of small messages."""
    bytes_per_second: float = FAR_BYTES_PER_SECOND
    """Into or out of one worker."""


@dataclass(frozen=True)
class Work:
    """A linear to be solved."""

    rows: int
    flops: float
    selections: int
    """Collective selections that are needed when the rows lie on several workers."""
    counts: int = 0
    """Sums of one number over these workers."""


@dataclass(frozen=True)
class Shared:
    """What the linears of one input share: computed by one worker, and sent to each other that solves any of them."""

    flops: float
    size_bytes: int


def is_local(method: Method, pattern: Pattern) -> bool:
    """Whether a row is selected without a look at the others: then any rows can be solved by themselves."""
    return isinstance(pattern, NM | PerRow) or method.within_rows


def work_of(method: Method, pattern: Pattern, options: Any, rows: int, columns: int) -> Work:
    """Return what solving a linear of this shape is.

    options: the method's own.
    """
    flops = method.flops(rows, columns, options)
    if is_local(method, pattern):
        return Work(rows, flops, 0)
    return Work(rows, flops, method.selections(columns, options), method.counts(columns, options))


def shared_of(methods: Iterable[Method], columns: int, deviations: int = 0) -> Shared:
    """Return what linears with an input of so many channels share.

    methods: of the linears. deviations: as of :class:`billhook.layerworkers.statistics.Statistic`.
    """
    flops = sum(method.factor_flops(columns) for method in dict.fromkeys(methods)) + correction_flops(
        columns, deviations
    )
    return Shared(flops, shared_load(methods, columns, deviations).size_bytes)


def shared_load(methods: Iterable[Method], columns: int, deviations: int = 0) -> Load:
    """Return what of that each further solver is sent."""
    loads = (method.shared(columns) for method in dict.fromkeys(methods))
    return sum(loads, start=correction_load(columns, deviations))


def share_out(
    linears: Sequence[Work], shared: Shared, workers: int, partition_rows: int, pace: Pace
) -> list[list[Rows]]:
    """Return, for each linear of one input, the rows of each worker, in the order of the workers.

    Either every linear is split by row partitions over some of the workers, or whole linears are dealt out to them, the
    largest first to the least loaded: whatever is estimated to end first. Row ranges are unions of row partitions.
    """
    ways = []
    for solvers in range(1, workers + 1):
        sending = min(solvers - 1, 2) * shared.size_bytes / pace.bytes_per_second
        split = [_split(work.rows, solvers, partition_rows) for work in linears]
        ways.append((sending + sum(map(partial(_seconds, pace), linears, split)), split))
        dealt, flops = _deal(linears, solvers)
        ways.append((sending + flops / pace.flops_per_second, dealt))
    _, best = min(ways, key=itemgetter(0))
    return [[*ranges, *[(0, 0)] * (workers - len(ranges))] for ranges in best]


def share_out_stage(
    groups: Sequence[Sequence[Work]], shared: Sequence[Shared], workers: int, partition_rows: int, pace: Pace
) -> list[list[list[Rows]]]:
    """Return, for each linear of each input group, the rows of each worker.

    A single group is shared out by :func:`share_out`. Several are dealt out whole, so that no worker waits for what
    another does with its own. shared: of each group.
    """
    if len(groups) == 1 or workers == 1:
        return [share_out(own, each, workers, partition_rows, pace) for own, each in zip(groups, shared, strict=True)]
    whole = [
        Work(1, sum(work.flops for work in group) + each.flops, 0) for group, each in zip(groups, shared, strict=True)
    ]
    dealt, _ = _deal(whole, workers)
    return [
        [[(0, work.rows if own != (0, 0) else 0) for own in owners] for work in group]
        for group, owners in zip(groups, dealt, strict=True)
    ]


def _seconds(pace: Pace, work: Work, ranges: Sequence[Rows]) -> float:
    """Return how long the workers take to solve a linear together."""
    most = max(stop - start for start, stop in ranges)
    exchanges = (len(KEY_LEVELS) * work.selections + work.counts) * (len(ranges) > 1)
    return work.flops * most / work.rows / pace.flops_per_second + exchanges * pace.exchange_seconds


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
