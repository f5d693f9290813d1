"""Several ways to change a model, tried together: each block is loaded once, and every way has its own hidden states.

A stream is the hidden states of all samples in one changed model. In a block a stream may be split: each branch of it
goes through the block changed in its own way. Ways that have been alike so far are one stream.

Legend: R rows (outputs), C columns (inputs).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from billhook.kernels.select import smallest_by_row, smallest_in_rows, zero_where_
from billhook.layerworkers.activations import Activations
from billhook.layerworkers.block_facts import Arguments, InputGroup
from billhook.layerworkers.collective import Collective
from billhook.layerworkers.lockstep import run_observed, run_plain
from billhook.layerworkers.observing import InputSquares
from billhook.layerworkers.row_shares import row_counts
from billhook.layerworkers.scratch import bands
from billhook.layerworkers.tasks import ModuleTensor, Sample

NOISE_ROWS = 256
"""Rows whose noise is drawn at once: it decides the numbers."""


@dataclass(frozen=True)
class Prune:
    """Remove the same share of every row of a block's linears: what has the smallest Wanda scores on its own inputs."""

    sparsity: float
    """A row of C entries loses ``int(C * sparsity)``."""


@dataclass(frozen=True, eq=False)
class RowScores:
    """What tells the rows of a block's linears apart."""

    of: Mapping[str, np.ndarray]
    """[R] by name on disk. The rows of linears that are missing lose the same."""


@dataclass(frozen=True)
class PruneRows:
    """Remove as many entries of a block's linears as :class:`Prune`, but fewer of the rows with larger scores."""

    sparsity: float
    spread: float
    scores: RowScores
    """See :func:`billhook.layerworkers.row_shares.row_counts`."""


@dataclass(frozen=True)
class Perturb:
    """Add Gaussian noise to a block's linears."""

    scale: float
    """Its standard deviation; the same noise is subtracted where it is negative."""
    seed: int


Change = Prune | PruneRows | Perturb | None
"""What is done to a block; None: nothing."""


@dataclass(frozen=True)
class Deviation:
    """How a pruned block is from the dense one, both fed with the same hidden states.

    Of each linear, a [C] has the 2-norms of the input channels in the dense block, b in the pruned one.
    """

    distance: float
    """Sum over the linears of ``|| a / sum(a) - b / sum(b) ||_2 / C`` (Cunegatti et al., NeuronAl, 2025, its code)."""
    shrinkage: Mapping[str, np.ndarray]
    """``a - b`` [C] float32, by the name on disk of the first linear with that input."""


NO_DEVIATION = Deviation(0.0, {})
"""Where nothing was pruned."""


@dataclass(frozen=True)
class Branch:
    """A stream beyond a block."""

    parent: int
    """Number of the stream that enters the block."""
    change: Change


@dataclass(frozen=True)
class BranchTask:
    """One block that the streams go through."""

    index: int
    tensors: tuple[ModuleTensor, ...]
    linears: tuple[tuple[str, str], ...]
    """Names in the block, and on disk, of the linears that are changed."""
    branches: tuple[Branch, ...]
    """The streams beyond the block, by parent: those of one are together. A stream without a branch ends."""
    samples: int
    """Over all workers."""
    next_tensors: tuple[ModuleTensor, ...] = ()
    """What will be loaded after this block; read while it is computed."""


@dataclass(frozen=True)
class LoadedBlock:
    """A dense block, and where its linears are."""

    module: nn.Module
    groups: Sequence[InputGroup]
    disk_names: Mapping[str, str]
    """Of the linears that are changed, by their names in the block."""
    weights: Mapping[str, Tensor]
    """Dense, [R, C], by name on disk."""
    put: Callable[[str, Tensor], None]
    """Puts a tensor into the module, given the name on disk of the weight that it takes the place of."""
    arguments: Arguments | None


@torch.inference_mode()
def run_branches(
    block: LoadedBlock,
    streams: Sequence[Activations],
    branches: Sequence[Branch],
    samples: Sequence[Sample],
    partitions: int,
    new_stream: Callable[[], Activations],
    device: torch.device,
    group: Collective,
) -> tuple[list[Activations], list[Deviation]]:
    """Carry streams through a block, and split them; return the branches, and how each deviates.

    What is returned is the same on every worker, whatever number of them there is; collective over ``group``.

    samples: this worker's, each a partition of its own. partitions: samples over all workers. new_stream: makes one
    without hidden states. The last branch of a stream takes its place.
    """
    made: list[Activations] = []
    deviations: list[Deviation] = []
    indices = [each.index for each in samples]
    norms: dict[str, Tensor] = {}
    of_parent = -1
    for number, branch in enumerate(branches):
        if branch.parent != of_parent and isinstance(branch.change, Prune | PruneRows):
            dense = InputSquares(block.module, block.groups, block.disk_names, indices, 1, device)
            if dense.groups:
                run_observed(block.module, dense.groups, streams[branch.parent], block.arguments, dense.add)
            norms, of_parent = dense.norms(partitions, group), branch.parent
        states = streams[branch.parent]
        if any(later.parent == branch.parent for later in branches[number + 1 :]):
            states = _copy(states, new_stream())
        _put_changed(block, branch.change, norms)
        if isinstance(branch.change, Prune | PruneRows):
            squares = InputSquares(block.module, block.groups, block.disk_names, indices, 1, device)
            _run_watched(block, states, squares)
            deviations.append(_deviation(norms, squares.norms(partitions, group), squares.firsts))
        else:
            run_plain(block.module, states, block.arguments)
            deviations.append(NO_DEVIATION)
        made.append(states)
        if branch.change is not None:
            for name in block.disk_names.values():
                block.put(name, block.weights[name])
    return made, deviations


def _copy(states: Activations, into: Activations) -> Activations:
    for hidden in states:
        into.append(hidden.clone())
    return into


def _run_watched(block: LoadedBlock, states: Activations, squares: InputSquares) -> None:
    """Carry samples through a block as it is, with an eye on what enters its linears."""
    position = 0
    handles = [
        block.module.get_submodule(each.stop).register_forward_pre_hook(
            # A hook that returned something would replace the input.
            lambda _module, given, each=each: squares.add(position, each, given[0])
        )
        for each in squares.groups
    ]
    try:
        for position in range(len(states)):
            one = [states[position]]
            run_plain(block.module, one, block.arguments)
            states[position] = one[0]
    finally:
        for handle in handles:
            handle.remove()


def _put_changed(block: LoadedBlock, change: Change, norms: Mapping[str, Tensor]) -> None:
    for number, name in enumerate(block.disk_names.values()):
        if isinstance(change, Prune):
            block.put(name, pruned(block.weights[name], norms[name], change.sparsity))
        elif isinstance(change, PruneRows):
            block.put(name, pruned_by_row(block.weights[name], norms[name], change, name))
        elif isinstance(change, Perturb):
            block.put(name, perturbed(block.weights[name], change, number))


def pruned(weight_RC: Tensor, norms_C: Tensor, sparsity: float) -> Tensor:
    """Return a copy without the ``int(C * sparsity)`` entries of each row that have the smallest Wanda scores."""
    count = int(weight_RC.shape[1] * sparsity)
    return _without(weight_RC, norms_C, lambda score_RC, start: smallest_in_rows(score_RC, count))


def pruned_by_row(weight_RC: Tensor, norms_C: Tensor, change: PruneRows, name: str) -> Tensor:
    """Return a copy without those entries of each row that have the smallest Wanda scores; name: on disk."""
    if name not in change.scores.of:
        return pruned(weight_RC, norms_C, change.sparsity)
    rows, columns = weight_RC.shape
    removed = rows * int(columns * change.sparsity)
    counts_R = torch.from_numpy(row_counts(change.scores.of[name], columns, removed, change.spread))
    return _without(
        weight_RC,
        norms_C,
        lambda score_RC, start: smallest_by_row(score_RC, counts_R[start : start + len(score_RC)]),
    )


def _without(weight_RC: Tensor, norms_C: Tensor, chosen: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Return a copy without what is chosen; ``chosen(score_RC, start)`` of the rows from ``start`` on."""
    sparse_RC = weight_RC.to(norms_C.device, copy=True).contiguous()
    for start, stop in bands(weight_RC.shape):
        score_RC = sparse_RC[start:stop].float().abs().mul_(norms_C)
        zero_where_(sparse_RC[start:stop], chosen(score_RC, start))
    return sparse_RC


def perturbed(weight_RC: Tensor, change: Perturb, number: int) -> Tensor:
    """Return the weight plus noise, in float32; number: of the linear in its block."""
    noisy_RC = weight_RC.to(torch.float32, copy=True)
    generator = torch.Generator().manual_seed((change.seed << 16) + number)
    for start in range(0, len(noisy_RC), NOISE_ROWS):
        band_RC = noisy_RC[start : start + NOISE_ROWS]
        noise_RC = torch.randn(band_RC.shape, generator=generator)
        band_RC += noise_RC.to(band_RC.device).mul_(change.scale)
    return noisy_RC


def _deviation(before: Mapping[str, Tensor], after: Mapping[str, Tensor], firsts: Sequence[str]) -> Deviation:
    """Return the deviation, given the norms by linear; firsts: the first linear of each input."""
    distances = (_normalised(norms_C) - _normalised(after[name]) for name, norms_C in before.items())
    return Deviation(
        math.fsum(float(distance_C.norm()) / len(distance_C) for distance_C in distances),
        {name: (before[name] - after[name]).cpu().numpy() for name in firsts},
    )


def _normalised(norms_C: Tensor) -> Tensor:
    total = norms_C.double().sum()
    return norms_C.double() / total if total > 0 else norms_C.double()
