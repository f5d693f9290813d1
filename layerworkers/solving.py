"""Solve the linears of one input group: reduce the statistics, share out the rows, gather the sparse weights.

Legend: R rows (outputs), C columns (inputs) of a linear.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from billhook.layerworkers.collective import Collective, all_gather, gather_to
from billhook.layerworkers.errors import RunError
from billhook.layerworkers.methods import METHODS, Method, Solution
from billhook.layerworkers.patterns import NM, Selector
from billhook.layerworkers.problem import LinearProblem
from billhook.layerworkers.reduction import Node, total
from billhook.layerworkers.sharing import Rows, Work, share_out
from billhook.layerworkers.statistics import Statistic, accumulate
from billhook.layerworkers.tasks import BlockTask, LinearReport, LinearTask


@dataclass(frozen=True)
class Solved:
    """A pruned linear, whole, on every worker."""

    weight: Tensor
    """[R, C] in its dtype on disk, on the CPU; zeros are positive where anything was removed."""
    report: LinearReport


def solve_group(
    linears: Sequence[LinearTask],
    weights: Mapping[str, Tensor],
    inputs: Sequence[tuple[int, Tensor]],
    task: BlockTask,
    group: Collective,
    device: torch.device,
) -> list[Solved]:
    """Prune linears that share one input; collective over ``group``. Returns all of them, on every worker, in order.

    weights: the dense weights by name on disk, [R, C] in their dtype on disk.
    inputs: (sample number, input [1, T, C]) of this worker's samples, in order.

    Raises:
        RunError: when a solve fails: the linear is named.
    """
    method = METHODS[linears[0].method]
    columns = weights[linears[0].disk_name].shape[1]
    shares = share_out(
        [_work(linear, weights[linear.disk_name]) for linear in linears], group.size, task.partition_rows
    )
    solvers = [rank for rank in range(group.size) if any(ranges[rank][0] < ranges[rank][1] for ranges in shares)]
    reduced = None
    if method.statistic is not None:
        reduced = _reduce(method.statistic, columns, inputs, task, group, solvers[0], device)
    parts: list[dict[str, Any] | None] = []
    if group.rank in solvers:
        problem = LinearProblem(reduced, columns, task.partition_rows, group.subgroup(solvers), device)
        parts = [
            _solve_share(linear, weights[linear.disk_name], ranges, group, problem)
            for linear, ranges in zip(linears, shares, strict=True)
        ]
    gathered = all_gather(group, parts)
    return [
        _assemble(
            linear, weights[linear.disk_name], shares[number], [parts[number] if parts else None for parts in gathered]
        )
        for number, linear in enumerate(linears)
    ]


def _work(linear: LinearTask, weight: Tensor) -> Work:
    method, (rows, columns) = METHODS[linear.method], weight.shape
    local = isinstance(linear.pattern, NM) or method.within_rows
    return Work(
        rows, method.flops(rows, columns, linear.options), 0 if local else method.selections(columns, linear.options)
    )


def _reduce(
    statistic: Statistic,
    columns: int,
    inputs: Sequence[tuple[int, Tensor]],
    task: BlockTask,
    group: Collective,
    root: int,
    device: torch.device,
) -> Tensor | None:
    """Return the statistic over all samples of all workers on ``root``, None elsewhere."""
    partitions: dict[int, list[Tensor]] = {}
    for sample, x in inputs:
        partitions.setdefault(sample // task.partition_samples, []).append(x)
    nodes = accumulate(statistic, columns, list(partitions.items()), device)
    if group.size > 1:
        message = [(node.level, node.index, node.total.cpu().numpy(), node.partitions) for node in nodes]
        gathered = gather_to(group, root, message)
        if group.rank != root:
            return None
        nodes = [
            Node(level, index, torch.from_numpy(np.array(array)).to(device), partitions)
            for message in gathered
            for level, index, array, partitions in message
        ]
    return total(nodes, task.partitions)


def _solve_share(
    linear: LinearTask, weight: Tensor, ranges: Sequence[Rows], group: Collective, problem: LinearProblem
) -> dict[str, Any] | None:
    """Solve this worker's rows of one linear; None where it has none."""
    start, stop = ranges[group.rank]
    if start == stop:
        return None
    method = METHODS[linear.method]
    owners = [rank for rank, (first, last) in enumerate(ranges) if first < last]
    select = Selector(linear.pattern, method.within_rows, group.subgroup(owners))
    rows = weight[start:stop].to(problem.device, torch.float32, copy=True)
    try:
        solution = method.solve(rows, problem, select, linear.options)
    except RunError as error:
        raise RunError(f"{linear.disk_name}: {error}") from error
    sparse = _as_written(linear, method, solution, weight[start:stop])
    return {
        "bytes": sparse.view(torch.uint8).numpy(),
        "removed": solution.removed,
        "loss": solution.loss,
        "energy": solution.energy,
        "dampings": problem.dampings,
    }


def _as_written(linear: LinearTask, method: Method, solution: Solution, dense: Tensor) -> Tensor:
    """Cast the solution to the dtype on disk; what the method left alone keeps its bits, -0.0 becomes 0.0."""
    dtype = dense.dtype
    sparse = solution.weight_RC.to("cpu", dtype)
    if dtype == torch.float64:
        sparse = torch.where(sparse == dense.float(), dense, sparse)
    sparse.masked_fill_(sparse == 0, 0.0)
    if not torch.isfinite(sparse).all():
        raise RunError(f"{linear.disk_name}: {method.name} gave a weight that is not finite in {dtype}")
    return sparse


def _assemble(
    linear: LinearTask, dense: Tensor, ranges: Sequence[Rows], parts: Sequence[dict[str, Any] | None]
) -> Solved:
    weight = torch.empty_like(dense)
    own = [part for part in parts if part is not None]
    for (start, stop), part in zip(ranges, parts, strict=True):
        if part is not None:
            weight.view(torch.uint8)[start:stop] = torch.from_numpy(np.array(part["bytes"]))
    removed = sum(part["removed"] for part in own)
    if removed == 0:
        weight = dense  # untouched to the last bit, rather than equal up to the rounding of a solve
    # fsum is exact, so the order of the partitions does not matter.
    loss = math.fsum(value for part in own for value in part["loss"])
    energy = math.fsum(value for part in own for value in part["energy"])
    report = LinearReport(
        name=linear.disk_name,
        shape=(dense.shape[0], dense.shape[1]),
        pattern=str(linear.pattern),
        method=linear.method,
        removed=removed,
        zeros=int((weight == 0).sum()),
        error=loss / energy if energy else 0.0,
        dampings=tuple(own[0]["dampings"]),
    )
    return Solved(weight, report)
