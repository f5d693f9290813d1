"""Wanda's scores of a dense block, in a few numbers for each linear: what allocators look at.

Legend: R rows (outputs), C columns (inputs).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from billhook.layerworkers.block_facts import Arguments, InputGroup
from billhook.layerworkers.collective import Collective, all_gather, broadcast
from billhook.layerworkers.lockstep import run_observed
from billhook.layerworkers.scratch import bands
from billhook.layerworkers.solving import sum_over_workers
from billhook.layerworkers.statistics import COLUMN_SQUARES, Accumulator

T = TypeVar("T")

LEVEL_BITS = 16
"""Of a score's 32 bits those that are cut off where scores are counted by size."""

LEVELS = 1 << (31 - LEVEL_BITS)

SHARES = np.linspace(0, 1, 101)


@dataclass(frozen=True)
class ScoreFacts:
    """A linear's scores ``|W_ij| ||X_j||``."""

    name: str
    """Name of its weight on disk."""
    entries: int
    total: float
    """Sum of the scores."""
    above: int
    """Scores above a multiple of the block's mean."""
    above_own: int
    """Scores above the same multiple of the linear's own mean."""
    lost: tuple[float, ...]
    """Of the squared scores' sum, the share of the smallest 0, 1, 2 ... 100 % of the entries: from 0 to 1."""


class InputSquares:
    """Sums the squares of what enters some linears of a block, by input channel."""

    def __init__(
        self,
        block: nn.Module,
        groups: Sequence[InputGroup],
        disk_names: Mapping[str, str],
        samples: Sequence[int],
        partition_samples: int,
        device: torch.device,
    ):
        """disk_names: of the linears that count, by their names in the block. samples: this worker's, by position."""
        self.groups = [each for each in groups if any(name in disk_names for name in each.linears)]
        """Those of the block's groups that some of the linears belong to."""
        self._columns = [int(block.get_submodule(each.linears[0]).in_features) for each in self.groups]  # type: ignore[arg-type]
        self._sums = [Accumulator(COLUMN_SQUARES, width, partition_samples, device) for width in self._columns]
        self._disk_names, self._samples, self._device = disk_names, samples, device
        self.firsts = [next(disk_names[name] for name in each.linears if name in disk_names) for each in self.groups]
        """By name on disk, the first of these linears that belongs to each group."""

    def add(self, position: int, at: InputGroup, x: Tensor) -> None:
        """Add the input x [..., C] of the sample at a position; samples come in order."""
        self._sums[self.groups.index(at)].add(self._samples[position], x)

    def norms(self, partitions: int, group: Collective) -> dict[str, Tensor]:
        """Return the 2-norms [C] of each linear's input channels over all samples of all workers, by name on disk."""
        norms: dict[str, Tensor] = {}
        for each, own, width in zip(self.groups, self._sums, self._columns, strict=True):
            total = sum_over_workers((width,), own.nodes(), partitions, group, 0, self._device)
            squares = broadcast(group, 0, None if total is None else total.cpu().numpy())
            norms |= {
                self._disk_names[name]: torch.tensor(squares).sqrt().to(self._device)
                for name in each.linears
                if name in self._disk_names
            }
        return norms


def observe_scores(
    block: nn.Module,
    groups: Sequence[InputGroup],
    disk_names: Mapping[str, str],
    weights: Mapping[str, Tensor],
    samples: Sequence[int],
    partition_samples: int,
    partitions: int,
    multiple: float,
    hidden: Sequence[Tensor],
    arguments: Arguments | None,
    device: torch.device,
    group: Collective,
) -> list[ScoreFacts]:
    """Run the block as it is and return the facts of its linears, the same on every worker; collective over ``group``.

    disk_names: of the linears that count, by their names in the block. weights: dense, [R, C], by name on disk.
    samples: the indices of this worker's. multiple: of the mean over all these linears, in :attr:`ScoreFacts.above`.
    """
    squares = InputSquares(block, groups, disk_names, samples, partition_samples, device)
    if squares.groups:
        run_observed(block, squares.groups, hidden, arguments, squares.add)
    norms = squares.norms(partitions, group)
    dealt = list(norms)[group.rank :: group.size]
    totals = _merged(group, {name: score_total(weights[name], norms[name]) for name in dealt})
    entries = sum(weights[name].numel() for name in totals)
    limit = multiple * math.fsum(totals[name] for name in norms) / max(entries, 1)
    facts = _merged(
        group, {name: score_facts(name, weights[name], norms[name], totals[name], limit, multiple) for name in dealt}
    )
    return [facts[name] for name in norms]


def _merged(group: Collective, own: Mapping[str, T]) -> dict[str, T]:
    return {name: value for each in all_gather(group, dict(own)) for name, value in each.items()}


def _scores(weight: Tensor, norms_C: Tensor) -> Iterator[Tensor]:
    for start, stop in bands(weight.shape):
        # Not in place: a weight in float32 is the caller's.
        yield weight[start:stop].to(norms_C.device, torch.float32).abs() * norms_C


def score_total(weight: Tensor, norms_C: Tensor) -> float:
    """Return the sum of a linear's scores, given its weight [R, C] and the 2-norms of its input channels."""
    return math.fsum(float(scores.sum(dtype=torch.float64)) for scores in _scores(weight, norms_C))


def score_facts(name: str, weight: Tensor, norms_C: Tensor, total: float, limit: float, multiple: float) -> ScoreFacts:
    """Return the facts of a linear's scores.

    total: as :func:`score_total` has it. limit: above which scores are counted as those above a multiple of the block's
    mean. multiple: of the linear's own mean.
    """
    own_limit = multiple * total / max(weight.numel(), 1)
    above, above_own, counts = 0, 0, torch.zeros(LEVELS, dtype=torch.int64)
    for scores in _scores(weight, norms_C):
        above += int((scores > limit).sum())
        above_own += int((scores > own_limit).sum())
        levels = scores.view(torch.int32).bitwise_right_shift(LEVEL_BITS)
        counts += torch.bincount(levels.flatten(), minlength=LEVELS).cpu()
    return ScoreFacts(name, weight.numel(), total, above, above_own, _lost(counts.numpy()))


def _lost(counts: np.ndarray) -> tuple[float, ...]:
    """Return :attr:`ScoreFacts.lost`, given how many scores there are of each level: all those of one count alike."""
    levels = np.flatnonzero(counts)
    middles = ((levels.astype(np.int32) << LEVEL_BITS) + (1 << (LEVEL_BITS - 1))).astype(np.int32).view(np.float32)
    middles[levels == 0] = 0.0
    squares = np.concatenate([[0.0], np.cumsum(counts[levels] * middles.astype(np.float64) ** 2)])
    entries = np.concatenate([[0], np.cumsum(counts[levels])])
    if not squares[-1]:
        return tuple(float(share) for share in SHARES)
    return tuple(float(lost) for lost in np.interp(SHARES * entries[-1], entries, squares) / squares[-1])
