"""What is accumulated at the input of a linear: sums over tokens, so that merging is addition.

Legend: T tokens of a calibration sample, C input channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from billhook.kernels.gram import add_column_squares_, add_gram_
from billhook.layerworkers.reduction import Node, fold


@dataclass(frozen=True)
class Statistic:
    """An additive float32 statistic of the tokens that enter a linear."""

    name: str
    dimensions: int
    """1: a vector [C]; 2: a matrix [C, C]."""
    add_: Callable[[Tensor, Tensor], None]
    """``add_(total, x_TC)`` adds one sample's share to ``total`` in place."""

    def shape(self, columns: int) -> tuple[int, ...]:
        """Return the shape for an input of ``columns`` channels."""
        return (columns,) * self.dimensions

    def size_bytes(self, columns: int) -> int:
        """Return the bytes of one total."""
        return int(4 * columns**self.dimensions)


COLUMN_SQUARES = Statistic("column squares", 1, add_column_squares_)
"""Squared 2-norm of each input channel over all tokens: [C]."""

GRAM = Statistic("gram", 2, add_gram_)
"""``X^T X`` over all tokens, lower triangle: [C, C]. Twice over the number of samples it is SparseGPT's Hessian."""


def accumulate(
    statistic: Statistic, columns: int, partitions: Sequence[tuple[int, Sequence[Tensor]]], device: torch.device
) -> list[Node]:
    """Sum the statistic over each partition from zero, and the partitions in the fixed tree as far as they go.

    partitions: (partition number, inputs of its samples, each [..., C]), consecutive and in order.
    """
    nodes: list[Node] = []
    for number, inputs in partitions:
        subtotal = torch.zeros(statistic.shape(columns), dtype=torch.float32, device=device)
        for x in inputs:
            statistic.add_(subtotal, x.reshape(-1, columns))
        nodes = fold([*nodes, Node(0, number, subtotal)])
    return nodes
