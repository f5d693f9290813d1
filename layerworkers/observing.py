"""Wanda's scores of a dense block, in a few numbers for each linear: what allocators look at.

Legend: R rows (outputs), C columns (inputs).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from billhook.layerworkers.block_facts import Arguments, InputGroup
from billhook.layerworkers.collective import Collective, all_gather, broadcast
from billhook.layerworkers.lockstep import run_observed
from billhook.layerworkers.scratch import bands
from billhook.layerworkers.solving import sum_over_workers
from billhook.layerworkers.statistics import COLUMN_SQUARES, Accumulator


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
    seen = [each for each in groups if any(name in disk_names for name in each.linears)]
    columns = [block.get_submodule(each.linears[0]).in_features for each in seen]
    sums = [
        Accumulator(COLUMN_SQUARES, int(width), partition_samples, device)  # type: ignore[arg-type]
        for width in columns
    ]

    def on_input(position: int, at: InputGroup, x: Tensor) -> None:
        sums[seen.index(at)].add(samples[position], x)

    if seen:
        run_observed(block, seen, hidden, arguments, on_input)
    norms: dict[str, Tensor] = {}
    for each, own, width in zip(seen, sums, columns, strict=True):
        total = sum_over_workers(COLUMN_SQUARES, int(width), own.nodes(), partitions, group, 0, device)  # type: ignore[arg-type]
        squares = broadcast(group, 0, None if total is None else total.cpu().numpy())
        norms |= {
            disk_names[name]: torch.tensor(squares).sqrt().to(device) for name in each.linears if name in disk_names
        }
    dealt = list(norms)[group.rank :: group.size]
    totals = _merged(group, {name: _total(weights[name], norms[name]) for name in dealt})
    entries = sum(weights[name].numel() for name in totals)
    limit = multiple * math.fsum(totals[name] for name in norms) / max(entries, 1)
    above = _merged(group, {name: _above(weights[name], norms[name], limit) for name in dealt})
    return [ScoreFacts(name, weights[name].numel(), totals[name], int(above[name])) for name in norms]


def _merged(group: Collective, own: Mapping[str, float]) -> dict[str, float]:
    return {name: value for each in all_gather(group, dict(own)) for name, value in each.items()}


def _scores(weight: Tensor, norms_C: Tensor) -> Iterator[Tensor]:
    for start, stop in bands(weight.shape):
        yield weight[start:stop].to(norms_C.device, torch.float32).abs_() * norms_C


def _total(weight: Tensor, norms_C: Tensor) -> float:
    return math.fsum(float(scores.sum(dtype=torch.float64)) for scores in _scores(weight, norms_C))


def _above(weight: Tensor, norms_C: Tensor, limit: float) -> int:
    return sum(int((scores > limit).sum()) for scores in _scores(weight, norms_C))
