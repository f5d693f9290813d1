"""BESA: within each block, linears whose mask costs the block's output less become sparser; learnt by gradients."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from billhook.layerworkers.besa import Learning
from billhook.layerworkers.errors import OptionError
from billhook.orchestrator.allocation.budget import to_budget
from billhook.orchestrator.allocation.contract import Evidence, check_samples


@dataclass(frozen=True)
class BesaOptions:
    """Options of BESA; ``beta`` is that of the authors' scripts, ``rate`` ours: they use another optimiser."""

    samples: int = 32
    """Calibration samples that pass the blocks, the first ones; all, where there are fewer."""
    epochs: int = 1
    """Passes over them in each block."""
    beta: float = 5.0
    """Weight of the squared relative distance of the block's sparsity from what is asked; 0 or more."""
    rate: float = 0.3
    """Of Adam; above 0."""

    def __post_init__(self) -> None:
        check_samples(self.samples)
        if self.epochs < 1:
            raise OptionError(f"epochs={self.epochs}: expected at least 1")
        if not 0 <= self.beta < float("inf"):
            raise OptionError(f"beta={self.beta}: expected 0 or a positive number, for example 5")
        if not 0 < self.rate < float("inf"):
            raise OptionError(f"rate={self.rate}: expected a positive number, for example 0.3")


def besa(evidence: Evidence, sparsity: float, options: BesaOptions) -> list[float]:
    """Return what is learnt of the linears of each block, whose mean is what is asked: blocks are alike.

    The counts of each block add up by themselves, to less than a step.
    """
    if sparsity == 0:
        return [sparsity] * len(evidence.matrices)
    learnt = evidence.learnt(Learning(sparsity, options.epochs, options.beta, options.rate), options.samples)
    found: list[float] = []
    for block in evidence.pruned_blocks:
        numbers = [number for number, index in enumerate(evidence.blocks) if index == block]
        matrices = [evidence.matrices[number] for number in numbers]
        counts = to_budget([learnt[number] for number in numbers], matrices, Fraction(str(sparsity)))
        found += [count / matrix.size for count, matrix in zip(counts, matrices, strict=True)]
    return found
