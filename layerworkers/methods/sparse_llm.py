"""SparseLLM: SparseGPT, and in feed-forward networks an alternation with what flows through (Bai et al., NeurIPS 2024).

What is done to the network as a whole is in :mod:`billhook.layerworkers.auxiliaries`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from billhook.layerworkers.errors import OptionError
from billhook.layerworkers.methods import sparsegpt
from billhook.layerworkers.methods.contract import Alternation, check_ridge
from billhook.layerworkers.methods.sparsegpt import SPARSEGPT


@dataclass(frozen=True)
class Options(sparsegpt.Options):
    """Options of SparseLLM: SparseGPT's, and those of the alternation."""

    epochs: int = 4
    """How often auxiliaries and linears are fitted to each other; 0: SparseGPT."""
    alpha: float = 1.0
    """Weight of how far the auxiliaries are from what the first linears make; of the three only the ratios matter."""
    beta: float = 1.0
    """Weight of how far the output is from the dense network's."""
    gamma: float = 1.0
    """Weight of how far what enters the last linear is from what the activation makes."""
    ridge: float = 0.001
    """Pulls refitted linears towards the dense ones, on the unit-diagonal Gram."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epochs < 0:
            raise OptionError(f"epochs={self.epochs}: expected at least 0, for example 4")
        for name in ("alpha", "beta", "gamma"):
            if not 0 < getattr(self, name) < math.inf:
                raise OptionError(f"{name}={getattr(self, name)}: expected a positive number, for example 1")
        check_ridge(self.ridge)


def alternation(options: Options) -> Alternation:
    """Return what is asked for of a block's feed-forward network."""
    return Alternation(options.epochs, options.alpha, options.beta, options.gamma, options.ridge)


SPARSE_LLM = replace(
    SPARSEGPT,
    name="sparsellm",
    source="Bai et al., SparseLLM, NeurIPS 2024 (arXiv 2402.17946), section 3",
    summary="sparsegpt, its feed-forward linears refitted in turns with what flows between them",
    options=Options,
    alternation=alternation,
)
