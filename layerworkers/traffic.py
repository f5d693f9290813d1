"""What workers move to each other to solve the linears of a stage, from shapes alone: the arithmetic of
:mod:`billhook.layerworkers.solving`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from billhook.kernels.select import KEY_LEVELS
from billhook.layerworkers.collective import (
    Load,
    Rows,
    are_passed_on,
    broadcast_rounds,
    busiest_bytes,
    message_bytes,
    messages,
    tensor_load,
)
from billhook.layerworkers.methods import Solver
from billhook.layerworkers.patterns import Pattern
from billhook.layerworkers.reduction import even_ranges, node_count, reduction_rounds
from billhook.layerworkers.sharing import Pace, Work, share_out_stage, shared_load, shared_of, work_of
from billhook.layerworkers.statistics import COLUMN_SQUARES, Statistic


@dataclass(frozen=True)
class Traffic:
    """Messages between workers."""

    moved_bytes: int
    """All together, as :class:`billhook.layerworkers.collective.Counted` counts them."""
    busiest_bytes: int
    """Of them, through the busiest worker's connection in each step: nothing else goes on in the meantime."""
    exchanges: int

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.moved_bytes + other.moved_bytes,
            self.busiest_bytes + other.busiest_bytes,
            self.exchanges + other.exchanges,
        )

    def __mul__(self, times: int) -> Traffic:
        return Traffic(times * self.moved_bytes, times * self.busiest_bytes, times * self.exchanges)


NOTHING = Traffic(0, 0, 0)


@dataclass(frozen=True)
class Matrix:
    """A linear's weight on disk."""

    rows: int
    columns: int
    item_bytes: int


def tuning_traffic(matrices: Sequence[Matrix], steps: int, compute_item_bytes: int, workers: int) -> Traffic:
    """Return the most that :func:`billhook.layerworkers.reconstruction.reconstruct` moves in so many steps.

    In each, two workers at most have a partition's gradients in float32, and a third sums them, some rows of them for
    another; then everybody gets the new weights.
    """
    if workers == 1:
        return NOTHING
    entries = sum(matrix.rows * matrix.columns for matrix in matrices)
    last = sum(matrix.rows * matrix.columns * matrix.item_bytes for matrix in matrices)
    summing = 4 if workers == 2 else 12
    moved = entries * steps * (summing + compute_item_bytes * (workers - 1)) + last * (workers - 1)
    busiest = entries * steps * (4 + 2 * compute_item_bytes) + 2 * last
    return Traffic(moved, min(moved, busiest), (3 * steps + 1) * len(matrices))


def squares_traffic(matrices: Sequence[Matrix], partitions: int, workers: int) -> Traffic:
    """Return what :meth:`billhook.layerworkers.gradients.GradientSquares.totals` moves."""
    traffic = reduced_squares_traffic(matrices, partitions, workers)
    for matrix in matrices if workers > 1 else []:
        traffic += _broadcast(tensor_load((matrix.rows, matrix.columns)), workers - 1)
    return traffic


def reduced_squares_traffic(matrices: Sequence[Matrix], partitions: int, workers: int) -> Traffic:
    """Return what :meth:`billhook.layerworkers.gradients.GradientSquares.reduced` moves."""
    if workers == 1:
        return NOTHING
    nodes = [node_count(start, stop) for start, stop in even_ranges(partitions, workers)]
    traffic = NOTHING
    for number, matrix in enumerate(matrices):
        traffic += _reduction(COLUMN_SQUARES, matrix.rows * matrix.columns, nodes, number % workers)
    return traffic


def stage_traffic(
    groups: Sequence[Sequence[Matrix]],
    statistics: Sequence[Statistic | None],
    solvers: Sequence[Sequence[Solver]],
    pattern: Pattern,
    partitions: int,
    partition_rows: int,
    workers: int,
    pace: Pace,
) -> Traffic:
    """Return what :func:`billhook.layerworkers.solving.solve_stage` moves between ``workers`` workers.

    groups: of each input group of the stage, the linears. statistics: what is summed at each input. solvers: by what
    the linears are solved.
    """
    if workers == 1:
        return NOTHING
    works = [
        [
            work_of(solver.method, pattern, solver.options, each.rows, each.columns)
            for each, solver in zip(group, own, strict=True)
        ]
        for group, own in zip(groups, solvers, strict=True)
    ]
    asked = [
        ([solver.method for solver in own], group[0].columns, 0 if statistic is None else statistic.deviations)
        for group, own, statistic in zip(groups, solvers, statistics, strict=True)
    ]
    shared = [shared_of(*each) for each in asked]
    ranges = share_out_stage(works, shared, workers, partition_rows, pace)
    traffic = Traffic(0, 0, 1)
    for load, work, own, statistic in zip(asked, works, ranges, statistics, strict=True):
        solving = [rank for rank in range(workers) if any(rows[rank][0] < rows[rank][1] for rows in own)]
        traffic += _broadcast(shared_load(*load), len(solving) - 1)
        if statistic is not None:
            nodes = [node_count(start, stop) for start, stop in even_ranges(partitions, workers)]
            traffic += _reduction(statistic, load[1], nodes, solving[0])
        for each, rows in zip(work, own, strict=True):
            traffic += _selections(each, sum(start < stop for start, stop in rows))
    if pattern.sparsity == 0:
        return traffic
    matrices = [matrix for group in groups for matrix in group]
    return traffic + _rows(matrices, [rows for own in ranges for rows in own], workers)


def _broadcast(load: Load, receivers: int) -> Traffic:
    """Return the traffic of :func:`billhook.layerworkers.collective.broadcast_bands`."""
    traffic = NOTHING
    for message in load.messages:
        exchanges = sum(1 if len(together) == 1 else 2 for together in broadcast_rounds(message, receivers))
        traffic += Traffic(receivers * sum(message), busiest_bytes(message, receivers), exchanges)
    return traffic


def _reduction(statistic: Statistic, columns: int, nodes: Sequence[int], root: int) -> Traffic:
    """Return the traffic of the sums of workers that have so many ``nodes`` each, by rank."""
    traffic = NOTHING
    for summed_by in reduction_rounds(statistic.shape(columns), max(nodes), len(nodes), root):
        own = {rank: statistic.sent_bytes(*span, columns) for rank, span in summed_by.items()}
        everything = sum(own.values())
        sent = [count * (everything - own.get(rank, 0)) for rank, count in enumerate(nodes)]
        received = [(sum(nodes) - nodes[rank]) * size for rank, size in own.items()]
        traffic += Traffic(sum(sent), max(*sent, *received), 1)
        if len(own) > 1:
            traffic += Traffic(everything - own[root], everything - own[root], 1)
    return traffic


def _selections(work: Work, owners: int) -> Traffic:
    """Return the traffic of finding thresholds over all rows: each owner sends its histograms to each other."""
    if owners == 1:
        return NOTHING
    sent = (owners - 1) * (work.selections * sum(4 << bits for bits in KEY_LEVELS) + 8 * work.counts)
    return Traffic(owners * sent, sent, len(KEY_LEVELS) * work.selections + work.counts)


def _rows(matrices: Sequence[Matrix], ranges: Sequence[Sequence[Rows]], workers: int) -> Traffic:
    """Return the traffic of :func:`billhook.layerworkers.collective.gather_rows_`."""
    shares = [
        [
            ((stop - start, matrix.columns), matrix.item_bytes)
            for matrix, (start, stop) in zip(matrices, own, strict=True)
        ]
        for own in zip(*ranges, strict=True)
    ]
    dealt = [messages(of_rank) for of_rank in shares]
    sizes = [tuple(message_bytes(of_rank, each) for each in own) for of_rank, own in zip(shares, dealt, strict=True)]
    if are_passed_on(sizes):
        return _broadcast(Load(tuple(sizes)), workers - 1)
    loads = [sum(item_bytes * math.prod(shape) for shape, item_bytes in of_rank) for of_rank in shares]
    sent = [(workers - 1) * load for load in loads]
    received = [sum(loads) - load for load in loads]
    return Traffic(sum(sent), max(*sent, *received), max(map(len, dealt)))
