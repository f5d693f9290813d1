"""ECoFLaP: blocks by how much the loss changes along a random direction, told by two losses each: no gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from billhook.layerworkers.candidates import Perturb
from billhook.layerworkers.errors import OptionError
from billhook.orchestrator.allocation.contract import Candidate, Evidence, check_samples

ABOVE = 0.1
"""By how much a block may be sparser than all together."""


@dataclass(frozen=True)
class EcoflapOptions:
    """Options of ECoFLaP; the scale is the authors'."""

    samples: int = 8
    """Calibration samples that pass the candidates, the first ones; all, where there are fewer."""
    scale: float = 1e-3
    """Standard deviation of the noise that is added and subtracted; above 0."""
    seed: int = 0
    """Of the noise; 0 to 4294967295."""

    def __post_init__(self) -> None:
        check_samples(self.samples)
        if not 0 < self.scale < float("inf"):
            raise OptionError(f"scale={self.scale}: expected a positive number, for example 0.001")
        if not 0 <= self.seed < 1 << 32:
            raise OptionError(f"seed={self.seed}: expected 0 to {(1 << 32) - 1}")


def kept_by_importance(importances: Sequence[float], sizes: Sequence[int], sparsity: float) -> list[float]:
    """Return how many entries of each block are kept, ``(1 - sparsity) sum(sizes)`` in all.

    Each keeps ``1 - sparsity - 0.1`` of its entries at least, and of the others a number that goes with its importance,
    at most all; what one cannot take the others share. Without any importance all keep the same share.
    """
    floors = [max(0.0, 1 - sparsity - ABOVE) * size for size in sizes]
    room = [size - floor for size, floor in zip(sizes, floors, strict=True)]
    kept = list(floors)
    left = (1 - sparsity) * sum(sizes) - math.fsum(floors)
    open_ones = {number for number, own in enumerate(importances) if own > 0}
    while open_ones:
        rate = left / math.fsum(importances[number] for number in open_ones)
        full = {number for number in open_ones if rate * importances[number] >= room[number]}
        for number in full or open_ones:
            taken = room[number] if full else rate * importances[number]
            kept[number] += taken
            left -= taken
        open_ones = open_ones - full if full else set()
    rest = [size - own for size, own in zip(sizes, kept, strict=True)]
    return [own + max(0.0, left) * free / (math.fsum(rest) or 1.0) for own, free in zip(kept, rest, strict=True)]


def importances_of(above: Sequence[float], below: Sequence[float], scale: float) -> list[float]:
    """Return ``|L(w + scale z) - L(w - scale z)| / (2 scale)``, which is near the derivative of L along z."""
    return [abs(one - other) / (2 * scale) for one, other in zip(above, below, strict=True)]


def ecoflap(evidence: Evidence, sparsity: float, options: EcoflapOptions) -> list[float]:
    """Return sparsities of blocks that keep the more, the more the loss depends on their weights.

    A tensor that would keep more than all of its entries leaves the rest to the others: the authors' code adds there
    what it should subtract. Theirs perturbs tensors one by one and sums by block; here a block's are changed together.
    """
    blocks = evidence.pruned_blocks
    candidates: list[Candidate] = [
        {block: Perturb(sign * options.scale, (options.seed << 12) + block)} for sign in (1, -1) for block in blocks
    ]
    losses = evidence.losses(candidates, options.samples)
    importances = importances_of(losses[: len(blocks)], losses[len(blocks) :], options.scale)
    sizes = [
        sum(matrix.size for matrix, index in zip(evidence.matrices, evidence.blocks, strict=True) if index == block)
        for block in blocks
    ]
    kept = kept_by_importance(importances, sizes, sparsity)
    of_block = {block: 1 - own / size for block, own, size in zip(blocks, kept, sizes, strict=True)}
    return [of_block[block] for block in evidence.blocks]
