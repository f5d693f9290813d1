"""What is accumulated at the input of a linear: sums over tokens, so that merging is addition.

Legend: T tokens of a calibration sample, C input channels, K deviations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from billhook.kernels.gram import BAND_ROWS, add_column_squares_, add_cross_, add_gram_, add_moments_
from billhook.layerworkers.reduction import Node, fold
from billhook.layerworkers.scratch import Parking
from billhook.layerworkers.triangles import band_bytes


@dataclass(frozen=True)
class Statistic:
    """An additive float32 statistic of the tokens that enter a linear."""

    name: str
    dimensions: int
    """1: a vector [C]; 2: a matrix [C, C]."""
    add_: Callable[[Tensor, Tensor], None]
    """``add_(total, x_TC)`` adds one sample's share to ``total`` in place."""

    vectors: int = 1
    """Vectors, one behind the other, that a statistic of one dimension is made of."""
    gives: frozenset[str] = frozenset()
    """Names of the other statistics that can be read off it."""
    below: int = 0
    """Rows below a matrix, each as wide as it."""
    deviates: bool = False
    """Whether these are ``D^T X``, where D holds so many values that deviate at each token."""

    def covers(self, other: Statistic) -> bool:
        """Whether it answers what the other does."""
        return other == self or other.name in self.gives

    @property
    def deviations(self) -> int:
        """Values that deviate at each token; 0: none are counted."""
        return self.below if self.deviates else 0

    def shape(self, columns: int) -> tuple[int, ...]:
        """Return the shape for an input of ``columns`` channels."""
        return (columns + self.below, columns) if self.dimensions == 2 else (self.vectors * columns,)

    def add(self, total: Tensor, x_TC: Tensor, d_TK: Tensor | None) -> None:
        """Add one sample's share to ``total`` in place; its deviations where these are counted."""
        if self.deviates:
            assert d_TK is not None
            add_cross_(total[x_TC.shape[1] :], d_TK, x_TC)
            total = total[: x_TC.shape[1]]
        self.add_(total, x_TC)

    def sent_bytes(self, start: int, stop: int, columns: int) -> int:
        """Return what a worker sends of some rows of one total: of a matrix the lower triangle, and what is below."""
        if self.dimensions == 1:
            return 4 * (stop - start)
        in_triangle = min(start, columns), min(stop, columns)
        return band_bytes(*in_triangle) + 4 * columns * (stop - start - in_triangle[1] + in_triangle[0])

    def flops(self, tokens: int, columns: int, on_gpu: bool) -> float:
        """Return what summing over so many tokens computes: of a matrix half, by symmetry, and on a GPU a bit more."""
        if self.dimensions == 1:
            return 2.0 * tokens * columns * self.vectors
        gram = float(tokens * columns) * (min(columns + BAND_ROWS, 2 * columns) if on_gpu else columns)
        return gram + 2.0 * tokens * columns * self.below

    def size_bytes(self, columns: int) -> int:
        """Return the bytes of one total."""
        return 4 * math.prod(self.shape(columns))


COLUMN_SQUARES = Statistic("column squares", 1, add_column_squares_)
"""Squared 2-norm of each input channel over all tokens: [C]."""

MOMENTS = Statistic("moments", 1, add_moments_, vectors=4, gives=frozenset({"column squares"}))
"""Squared 2-norm and sum of each input channel over all tokens, the number of these, and that of samples: [4 C]."""

GRAM = Statistic("gram", 2, add_gram_, gives=frozenset({"column squares"}))
"""``X^T X`` over all tokens, lower triangle: [C, C]. Twice over the number of samples it is SparseGPT's Hessian."""


def _add_gram_and_moments_(total: Tensor, x_TC: Tensor) -> None:
    columns = x_TC.shape[1]
    add_gram_(total[:columns], x_TC)
    add_moments_(total[columns:].view(-1), x_TC)


GRAM_AND_MOMENTS = Statistic(
    "gram and moments",
    2,
    _add_gram_and_moments_,
    gives=frozenset({"gram", "moments", "column squares"}),
    below=MOMENTS.vectors,
)
"""The Gram matrix, and below it the moments, a vector in each row: [C + 4, C]; whatever any method asks for."""


def covering(statistics: Sequence[Statistic]) -> Statistic | None:
    """Return the first that answers what all of them do; None where none does."""
    return next((each for each in statistics if all(each.covers(other) for other in statistics)), None)


def with_deviations(deviations: int) -> Statistic:
    """Return the Gram matrix with so many rows of products of what deviates with the input below it."""
    return replace(GRAM, name="gram with deviations", below=deviations, deviates=True)


class Accumulator:
    """Sums a statistic over each partition from zero, and the partitions in the fixed tree as far as they go."""

    def __init__(
        self,
        statistic: Statistic,
        columns: int,
        partition_samples: int,
        device: torch.device,
        parking: Parking | None = None,
    ):
        """parking: where partial sums wait for their siblings; None: where they are."""
        self._statistic, self._columns, self._partition_samples = statistic, columns, partition_samples
        self._device, self._parking = device, parking
        self._nodes: list[Node] = []
        self._partition, self._subtotal = -1, torch.empty(0)

    def add(self, sample: int, x: Tensor, deviation: Tensor | None = None) -> None:
        """Add the input x [..., C] of one sample, and what deviates there [..., K]; samples come in order."""
        if sample // self._partition_samples != self._partition:
            self._close()
            self._park_last()
            self._partition = sample // self._partition_samples
            self._subtotal = torch.zeros(self._statistic.shape(self._columns), dtype=torch.float32, device=self._device)
        if x.numel():  # of an expert's input there may be nothing
            d_TK = None if deviation is None else deviation.reshape(-1, deviation.shape[-1])
            self._statistic.add(self._subtotal, x.reshape(-1, self._columns), d_TK)

    def nodes(self, park: bool = False) -> list[Node]:
        """Return the sums, of consecutive partitions, in order, all parked if asked; nothing is left here."""
        self._close()
        if park:
            self._park_last()
        nodes, self._nodes = self._nodes, []
        return nodes

    def _close(self) -> None:
        if self._partition < 0:
            return
        self._nodes = fold([*self._nodes, Node(0, self._partition, self._subtotal)])
        self._partition, self._subtotal = -1, torch.empty(0)

    def _park_last(self) -> None:
        if self._parking is not None and self._nodes and isinstance(self._nodes[-1].total, Tensor):
            self._nodes[-1] = replace(self._nodes[-1], total=self._parking.park(self._nodes[-1].total))
