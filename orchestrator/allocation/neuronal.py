"""NeuronAl's block step: of several slopes of sparsity over the blocks, the one that changes activations least."""

from __future__ import annotations

import math
from dataclasses import dataclass

from billhook.layerworkers.candidates import Prune
from billhook.orchestrator.allocation.contract import Evidence, check_samples

SLOPES = (0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.09, 0.10, 0.12, 0.15, 0.20, 0.25)
"""Half the distances of the last block's sparsity from the first one's that are tried."""

STEEPEST_BELOW = 0.8
"""Sparsity from which on the last of them is left out."""

BOUNDS = (0.01, 0.99)
"""Of a block's sparsity."""


@dataclass(frozen=True)
class NeuronAlOptions:
    """Options of NeuronAl; the default is the authors'."""

    samples: int = 8
    """Calibration samples that pass the candidates, the first ones; all, where there are fewer."""

    def __post_init__(self) -> None:
        check_samples(self.samples)


def slope(sparsity: float, half: float, blocks: int) -> list[float]:
    """Return sparsities of blocks ``s_i = s + half (2 i / (L - 1) - 1)``, clipped to :data:`BOUNDS`."""
    if blocks == 1:
        return [sparsity]
    return [min(max(sparsity + half * (2 * i / (blocks - 1) - 1), BOUNDS[0]), BOUNDS[1]) for i in range(blocks)]


def neuronal(evidence: Evidence, sparsity: float, options: NeuronAlOptions) -> list[float]:
    """Return the sparsities of that slope over the blocks whose sum of deviations is smallest: of equal ones the first.

    Every block of every candidate is pruned by Wanda's scores, fed with what the candidate's blocks before it make of
    the samples.
    """
    blocks = evidence.pruned_blocks
    if sparsity == 0:
        return [sparsity] * len(evidence.matrices)
    tried = [half for half in SLOPES if sparsity < STEEPEST_BELOW or half < SLOPES[-1]]
    slopes = [slope(sparsity, half, len(blocks)) for half in tried]
    candidates = [{block: Prune(own) for block, own in zip(blocks, each, strict=True)} for each in slopes]
    totals = [math.fsum(each) for each in evidence.deviations(candidates, options.samples)]
    best = dict(zip(blocks, slopes[totals.index(min(totals))], strict=True))
    return [best[block] for block in evidence.blocks]
