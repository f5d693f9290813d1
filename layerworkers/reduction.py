"""Sums over partitions of the samples in one fixed binary tree, whatever worker holds which partition.

Node (level, index) covers the partitions ``index * 2^level`` up to the next node's; it is the sum of its two children,
left plus right, or its left child alone where the right one lies beyond the last partition. So the bits of the total
depend on the number of partitions only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from billhook.layerworkers.scratch import Parked, bands


@dataclass(frozen=True)
class Node:
    """The sum over an aligned range of partitions."""

    level: int
    index: int
    total: Tensor | Parked
    partitions: int = 1
    """Partitions in the sum."""


def fold(nodes: Iterable[Node]) -> list[Node]:
    """Merge neighbours bottom-up as far as both halves are there; totals of left children are reused in place.

    nodes: disjoint, of consecutive partitions, in order. Returned in order; at most two of each level remain.
    """
    stack: list[Node] = []
    for node in nodes:
        stack.append(node)
        while len(stack) > 1 and _are_siblings(stack[-2], stack[-1]):
            right, left = stack.pop(), stack.pop()
            merged = _sum_(left.total, right.total)
            stack.append(Node(left.level + 1, left.index // 2, merged, left.partitions + right.partitions))
    return stack


def _sum_(left: Tensor | Parked, right: Tensor | Parked) -> Tensor:
    """Return the sum in the place of one of the two: floating-point addition commutes, so either will do."""
    if isinstance(left, Tensor):
        return left.add_(right) if isinstance(right, Tensor) else _sum_(right, left)
    if not isinstance(right, Tensor):
        right = right.take()
    for start, stop in bands(left.shape):
        right[start:stop] += left.rows(start, stop).to(right.device)
    left.give_up()
    return right


def _are_siblings(left: Node, right: Node) -> bool:
    return left.level == right.level and left.index % 2 == 0 and right.index == left.index + 1


def total(nodes: Iterable[Node], partitions: int) -> Tensor:
    """Return the sum of all ``partitions``, given nodes that cover them in order.

    A node whose right sibling lies beyond the last partition is lifted as it is, until one node is left.
    """
    stack = fold(nodes)
    while len(stack) > 1 or stack[0].index > 0:
        last = stack.pop()
        stack = fold([*stack, Node(last.level + 1, last.index // 2, last.total, last.partitions)])
    assert stack[0].partitions == partitions, f"{stack[0].partitions} partitions summed, expected {partitions}"
    whole = stack[0].total
    return whole if isinstance(whole, Tensor) else whole.take()


def give_up(nodes: list[Node]) -> None:
    """Empty the list, and give up the places of what is parked."""
    for node in nodes:
        if not isinstance(node.total, Tensor):
            node.total.give_up()
    nodes.clear()


def node_count(start: int, stop: int) -> int:
    """Return how many nodes :func:`fold` leaves of the partitions from ``start`` to ``stop``."""
    count = 0
    while start < stop:
        largest = 1 << ((stop - start).bit_length() - 1)
        start += min(largest, start & -start) if start else largest
        count += 1
    return count


def most_nodes(partitions: int, workers: int) -> int:
    """Return the most nodes that any of the workers has, of partitions dealt out by :func:`even_ranges`."""
    return max(node_count(start, stop) for start, stop in even_ranges(partitions, workers))


def reduction_rounds(
    shape: tuple[int, ...], nodes: int, workers: int, root: int
) -> Iterator[dict[int, tuple[int, int]]]:
    """Yield which worker sums which rows (start, stop) of a statistic at the same time; the root is always among them.

    Of two workers the root sums all: the other's part would have to come back to it. nodes: the most that any worker
    has. What a worker sends, or is sent, at once is three times :data:`billhook.layerworkers.scratch.BAND_BYTES` at
    most.
    """
    ranks = [root, *(rank for rank in range(workers) if rank != root)] if workers > 2 else [root]
    spans = list(bands(shape, 4 * nodes * (max(2, -(-workers // 3)) if len(ranks) > 1 else 1)))
    for first in range(0, len(spans), len(ranks)):
        yield dict(zip(ranks, spans[first : first + len(ranks)], strict=False))


def even_ranges(partitions: int, workers: int) -> list[tuple[int, int]]:
    """Split the partitions into one consecutive range (start, stop) per worker, sizes differing by at most one."""
    bounds = [partitions * worker // workers for worker in range(workers + 1)]
    return list(pairwise(bounds))
