"""Solve the linears of input groups: reduce the statistics, share out the work, gather the sparse weights.

Legend: R rows (outputs), C columns (inputs) of a linear.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from billhook.kernels.products import row_partitions
from billhook.layerworkers.collected import read_collected
from billhook.layerworkers.collective import Collective, Rows, all_gather, gather_rows_
from billhook.layerworkers.errors import BlockLostError, RunError
from billhook.layerworkers.files import read_bytes
from billhook.layerworkers.methods import Method, Solution, method_named
from billhook.layerworkers.patterns import Selector, of_rows
from billhook.layerworkers.problem import CORRECTION_RIDGE, LinearProblem, RowsOf
from billhook.layerworkers.reduction import Node, give_up, most_nodes, reduction_rounds, total
from billhook.layerworkers.scratch import bands
from billhook.layerworkers.shards import TensorEntry
from billhook.layerworkers.sharing import is_local, share_out_stage, shared_of, work_of
from billhook.layerworkers.statistics import Statistic
from billhook.layerworkers.stopwatch import Stopwatch
from billhook.layerworkers.tasks import BlockTask, LinearReport, LinearTask
from billhook.layerworkers.triangles import Packed, lower, pack, unpack

_UNSIGNED = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32, 8: torch.uint64}

DENSE = "dense"
"""The pattern of a linear from which nothing is removed."""


@dataclass(frozen=True)
class _Share:
    """One worker's rows of a linear, solved."""

    sparse: Tensor
    """In the dtype on disk, on the CPU."""
    facts: _Facts


@dataclass(frozen=True)
class _Facts:
    """What all workers are told of one worker's rows of a linear."""

    removed: int
    zeros: int
    """Entries of the solution that are zero."""
    loss: list[float]
    energy: list[float]
    dampings: list[float]


@dataclass(frozen=True)
class Together:
    """Linears that share one input."""

    linears: Sequence[LinearTask]
    nodes: list[Node]
    """This worker's partial sums of the statistic; emptied as they are used."""
    statistic: Statistic | None
    """What is summed at the input; None: nothing."""
    of_output: bool = False
    """Whether what deviates is that to which the output of the only linear is added, that included."""
    collected: TensorEntry | None = None
    """Where the statistic was collected before; there are no sums then."""
    ridge: float = CORRECTION_RIDGE
    """Of the Gram where what deviates is explained by the input."""

    @property
    def methods(self) -> list[Method]:
        """What the linears are solved by, each once."""
        return list(dict.fromkeys(method_named(linear.method) for linear in self.linears))

    @property
    def deviations(self) -> int:
        """Rows of products of what deviates in the statistic."""
        return 0 if self.statistic is None else self.statistic.deviations


def solve_stage(
    groups: Sequence[Together],
    weights: Mapping[str, Tensor],
    task: BlockTask,
    group: Collective,
    device: torch.device,
    watch: Stopwatch,
    gradient_squares: Mapping[str, RowsOf] | None = None,
) -> Iterator[LinearReport]:
    """Prune the linears of input groups that are known at the same time; collective over ``group``.

    The work is shared out by :func:`billhook.layerworkers.sharing.share_out_stage`.

    weights: the dense weights by name on disk, [R, C] in their dtype on disk, on the CPU. On every worker each is
    overwritten by its sparse form before its report is yielded; zeros are positive where anything was removed.
    gradient_squares: of the weights whose methods ask for them, by name on disk.

    Raises:
        RunError: when a solve fails: the linear is named.
    """
    work = [
        [
            work_of(method_named(each.method), each.pattern, each.options, *weights[each.disk_name].shape)
            for each in together.linears
        ]
        for together in groups
    ]
    columns = [weights[together.linears[0].disk_name].shape[1] for together in groups]
    shared = [
        shared_of(together.methods, width, together.deviations) for together, width in zip(groups, columns, strict=True)
    ]
    dealt = len(groups) > 1 and group.size > 1
    ranges = share_out_stage(work, shared, group.size, task.partition_rows, task.pace)
    problems = (
        _problem(together, own, weights, task, group, device, watch)
        for together, own in zip(groups, ranges, strict=True)
    )
    shares: list[_Share | None] = []
    # Where each has groups of its own, all are reduced before the first is solved: nobody waits for a sum meanwhile.
    for together, own, problem in zip(groups, ranges, list(problems) if dealt else problems, strict=True):
        for linear, rows in zip(together.linears, own, strict=True):
            dense, squares = weights[linear.disk_name], (gradient_squares or {}).get(linear.disk_name)
            shares.append(
                None if problem is None else _solve_share(linear, dense, squares, rows, group, problem, together)
            )
        if problem is not None:
            problem.forget()
        del problem
    linears = [linear for together in groups for linear in together.linears]
    everywhere = [rows for own in ranges for rows in own]
    yield from _gather_(linears, [weights[linear.disk_name] for linear in linears], everywhere, shares, group)


def _problem(
    together: Together,
    ranges: Sequence[Sequence[Rows]],
    weights: Mapping[str, Tensor],
    task: BlockTask,
    group: Collective,
    device: torch.device,
    watch: Stopwatch,
) -> LinearProblem | None:
    """Sum the statistic of an input over all workers; return the problem where there are rows to solve."""
    columns = weights[together.linears[0].disk_name].shape[1]
    solvers = [rank for rank in range(group.size) if any(own[rank][0] < own[rank][1] for own in ranges)]
    reduced = None
    if together.statistic is not None and together.collected is not None:
        if group.rank == solvers[0]:
            with watch.part("files"):
                reduced = read_collected(together.collected, together.statistic, columns, device, read_bytes)
    elif together.statistic is not None:
        with watch.part("statistics"):
            shape = together.statistic.shape(columns)
            reduced = sum_over_workers(shape, together.nodes, task.partitions, group, solvers[0], device)
    if group.rank not in solvers:
        return None
    solving = group.subgroup(solvers)
    forms = sum(len(method.forms) for method in together.methods)
    return LinearProblem(reduced, columns, task.partition_rows, solving, device, watch, forms)


def sum_over_workers(
    shape: tuple[int, ...],
    nodes: list[Node],
    partitions: int,
    group: Collective,
    root: int,
    device: torch.device,
) -> Tensor | None:
    """Return the sum over all partitions of all workers on ``root``, None elsewhere; the nodes are used up.

    It is sent and summed in bands of rows, several at a time, each summed by another worker, so that nobody holds
    another's whole sums, and the root is not sent everybody's. Of a matrix the lower triangle is sent, and only that
    part of the result is meant. shape: of the sum.
    """
    if group.size == 1:
        summed = total(nodes, partitions)
        nodes.clear()
        return summed
    # The root's first sum is overwritten band by band, as each is consumed.
    reusable = next((node.total for node in nodes if isinstance(node.total, Tensor)), None)
    reduced = torch.empty(shape, dtype=torch.float32, device=device) if reusable is None else reusable
    for summed_by in reduction_rounds(shape, most_nodes(partitions, group.size), group.size, root):
        gathered = group.exchange(
            {
                rank: [(node.level, node.index, _packed(_band(node, *span), span), node.partitions) for node in nodes]
                for rank, span in summed_by.items()
            }
        )
        own = summed_by.get(group.rank)
        if own is not None:
            band = total(
                [
                    Node(level, index, _unpacked(array, own, shape).to(device), count)
                    for rank in range(group.size)
                    for level, index, array, count in gathered[rank]
                ],
                partitions,
            )
            if group.rank == root:
                reduced[slice(*own)] = band
        if len(summed_by) > 1:
            passed = group.exchange({root: _packed(band, own)} if own is not None and group.rank != root else {})
            for rank, array in passed.items():
                reduced[slice(*summed_by[rank])] = _unpacked(array, summed_by[rank], shape)
        del gathered  # before the next ones come
    give_up(nodes)
    return reduced if group.rank == root else None


def _band(node: Node, start: int, stop: int) -> Tensor:
    return node.total[start:stop] if isinstance(node.total, Tensor) else node.total.rows(start, stop)


def _packed(band: Tensor, span: Rows) -> Packed:
    return pack(band, span[0], lower) if band.dim() == 2 else band.cpu().numpy()


def _unpacked(packed: Packed, span: Rows, shape: tuple[int, ...]) -> Tensor:
    """Return some rows of a statistic of ``shape``."""
    start, stop = span
    return unpack(packed, (stop - start, *shape[1:]), start, lower) if len(shape) == 2 else torch.tensor(packed)


def _solve_share(
    linear: LinearTask,
    weight: Tensor,
    gradient_squares: RowsOf | None,
    ranges: Sequence[Rows],
    group: Collective,
    problem: LinearProblem,
    together: Together,
) -> _Share | None:
    """Solve this worker's rows of one linear; None where it has none. together: its input."""
    start, stop = ranges[group.rank]
    if start == stop:
        return None
    method = method_named(linear.method)
    problem.turn_to(weight, gradient_squares)
    owners = [rank for rank, (first, last) in enumerate(ranges) if first < last]
    dense = weight[start:stop]
    sparse = torch.empty_like(dense)
    removed, loss, energy = 0, list[float](), list[float]()
    # Rows that are selected by themselves need not be in float32 all at once.
    local = is_local(method, linear.pattern)
    pieces = row_partitions(len(dense), problem.partition_rows) if local else [(0, len(dense))]
    selecting = group.subgroup([group.rank] if local else owners)
    for first, last in pieces:
        select = Selector(of_rows(linear.pattern, start + first, start + last), method.within_rows, selecting)
        rows = dense[first:last].to(problem.device, torch.float32, copy=True)
        problem.turn_to_rows(start + first, start + last)
        try:
            if linear.correction:
                of_output, ridge = together.of_output, together.ridge
                rows = problem.corrected(rows, start + first, linear.correction, of_output, ridge)
            solution = method.solve(rows, problem, select, linear.options)
        except RunError as error:
            raise type(error)(f"{linear.disk_name}: {error}") from error
        del rows
        sparse[first:last] = _as_written(linear, method, solution, dense[first:last])
        removed += solution.removed
        loss += solution.loss
        energy += solution.energy
    return _Share(sparse, _Facts(removed, _zeros(sparse), loss, energy, problem.dampings))


def _as_written(linear: LinearTask, method: Method, solution: Solution, dense: Tensor) -> Tensor:
    """Cast the solution to the dtype on disk; what the method left alone keeps its bits, -0.0 becomes 0.0."""
    dtype = dense.dtype
    sparse = solution.weight_RC.to("cpu", dtype)
    if dtype == torch.float64:
        sparse = torch.where((sparse == dense.float()) & (sparse != 0), dense, sparse)
    sparse.add_(0.0)  # makes 0.0 of -0.0, and changes nothing else
    if not torch.isfinite(torch.stack(sparse.aminmax())).all():
        raise BlockLostError(f"{linear.disk_name}: {method.name} gave a weight that is not finite in {dtype}")
    return sparse


def _zeros(weight: Tensor) -> int:
    """Count zeros of either sign; numpy counts integers much faster than torch counts floats."""
    bits = weight.view(_UNSIGNED[weight.element_size()]).numpy()
    return sum(
        bits[start:stop].size - int(np.count_nonzero(bits[start:stop] << 1)) for start, stop in bands(weight.shape)
    )


def _gather_(
    linears: Sequence[LinearTask],
    weights: Sequence[Tensor],
    ranges: Sequence[Sequence[Rows]],
    shares: list[_Share | None],
    group: Collective,
) -> list[LinearReport]:
    """Overwrite the dense weights by the rows of all workers, on all workers; the shares are used up."""
    gathered = all_gather(group, [None if share is None else share.facts for share in shares])
    facts = [[each for each in of_linear if each is not None] for of_linear in zip(*gathered, strict=True)]
    # What nothing is removed from stays as it is to the last bit, rather than equal up to the rounding of a solve.
    changed = [number for number, own in enumerate(facts) if any(each.removed for each in own)]
    for number in changed:
        _place_(weights[number], ranges[number][group.rank], shares[number])
    shares.clear()
    gather_rows_(group, [weights[number] for number in changed], [ranges[number] for number in changed])
    return [_report(*each) for each in zip(linears, weights, facts, strict=True)]


def _place_(weight: Tensor, rows: Rows, share: _Share | None) -> None:
    if share is not None:
        weight[slice(*rows)] = share.sparse


def left_dense(linear: LinearTask, weight: Tensor) -> LinearReport:
    """Return the report of a linear from which nothing is removed after all."""
    shape = (weight.shape[0], weight.shape[1])
    return LinearReport(linear.disk_name, shape, DENSE, "none", 0, _zeros(weight), 0.0, ())


def recounted(report: LinearReport, weight: Tensor) -> LinearReport:
    """Return the report of a linear whose kept weights were changed, with the zeros that there are now."""
    return replace(report, zeros=_zeros(weight))


def _report(linear: LinearTask, weight: Tensor, facts: Sequence[_Facts]) -> LinearReport:
    # fsum is exact, so the order of the partitions does not matter.
    loss = math.fsum(value for own in facts for value in own.loss)
    removed = sum(own.removed for own in facts)
    energy = math.fsum(value for own in facts for value in own.energy)
    return LinearReport(
        name=linear.disk_name,
        shape=(weight.shape[0], weight.shape[1]),
        pattern=str(linear.pattern),
        method=linear.method,
        removed=removed,
        zeros=sum(own.zeros for own in facts) if removed else _zeros(weight),
        error=loss / energy if energy else 0.0,
        dampings=tuple(facts[0].dampings),
    )
