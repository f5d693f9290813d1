"""The allocators: from shapes, weights, or the scores of the dense model to a sparsity for each linear."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from billhook.layerworkers.errors import OptionError
from billhook.orchestrator.allocation.alphapruning import AlphaPruningOptions, alphapruning
from billhook.orchestrator.allocation.besa import BesaOptions, besa
from billhook.orchestrator.allocation.contract import (
    Allocator,
    Evidence,
    NoOptions,
    below,
    check_spread,
    of_blocks,
    spread_out,
)
from billhook.orchestrator.allocation.ecoflap import EcoflapOptions, ecoflap
from billhook.orchestrator.allocation.knapsack import KnapsackOptions, error_knapsack
from billhook.orchestrator.allocation.mosaic import MosaicOptions, mosaic
from billhook.orchestrator.allocation.neuronal import NeuronAlOptions, neuronal
from billhook.orchestrator.allocation.shapley import SvNupOptions, sv_nup

UNIFORM = "uniform"


@dataclass(frozen=True)
class OwlOptions:
    """Options of OWL; the defaults are those of the authors for Llama."""

    outlier: float = 5.0
    """A score is an outlier above so many times the mean of its block; above 0."""
    spread: float = 0.08
    """Half the distance of the sparsest block from the densest; between 0 and 0.5."""

    def __post_init__(self) -> None:
        if not 0 < self.outlier < float("inf"):
            raise OptionError(f"outlier={self.outlier}: expected a positive number, for example 5")
        check_spread(self.spread)


@dataclass(frozen=True)
class DlpOptions:
    """Options of DLP; the default is the authors'."""

    spread: float = 0.15
    """Half the distance of the sparsest block from the densest; between 0 and 0.5."""

    def __post_init__(self) -> None:
        check_spread(self.spread)


def uniform(evidence: Evidence, sparsity: float, options: NoOptions) -> list[float]:
    """Return the same sparsity for all."""
    return [sparsity] * len(evidence.matrices)


def erk(evidence: Evidence, sparsity: float, options: NoOptions) -> list[float]:
    """Return sparsities by ERK: densities go with ``(R + C) / (R C)``; those that would exceed 1 are 1."""
    matrices = evidence.matrices
    sizes = np.array([matrix.size for matrix in matrices], dtype=np.float64)
    raw = np.array([(matrix.rows + matrix.columns) / matrix.size for matrix in matrices])
    dense = np.zeros(len(matrices), dtype=bool)
    budget = (1 - sparsity) * sizes.sum()
    while True:
        scale = (budget - sizes[dense].sum()) / (raw * sizes)[~dense].sum()
        above = ~dense & (scale * raw > 1)
        if not above.any():
            return [0.0 if full else float(1 - scale * share) for full, share in zip(dense, raw, strict=True)]
        dense |= above


def global_magnitude(evidence: Evidence, sparsity: float, options: NoOptions) -> list[float]:
    """Return the shares of each matrix that lie below one threshold of ``|W|`` for all of them."""
    found = evidence.histograms()
    return below([each.counts for each in found], [each.squares for each in found], sparsity)


def lamp(evidence: Evidence, sparsity: float, options: NoOptions) -> list[float]:
    """Return the shares below one threshold of the LAMP score ``w_u^2 / sum of w_v^2 over all |w_v| >= |w_u|``.

    Entries of a matrix that are alike in magnitude have the score of the first of them.
    """
    found = evidence.histograms()
    scores = []
    for each in found:
        tails = np.cumsum((each.counts * each.squares)[::-1])[::-1]
        scores.append(np.divide(each.squares, tails, out=np.zeros_like(tails), where=tails > 0))
    return below([each.counts for each in found], scores, sparsity)


def owl(evidence: Evidence, sparsity: float, options: OwlOptions) -> list[float]:
    """Return sparsities by OWL: blocks in which more scores are outliers stay denser."""
    blocks = [block for block in evidence.scores(options.outlier) if block]
    shares = [sum(each.above for each in block) / max(1, sum(each.entries for each in block)) for block in blocks]
    return of_blocks(blocks, evidence, spread_out(shares, sparsity, options.spread))


def dlp(evidence: Evidence, sparsity: float, options: DlpOptions) -> list[float]:
    """Return sparsities by DLP: blocks whose mean score is a larger part of the sum over all blocks are sparser.

    The authors' code takes the mean for unstructured patterns; their paper says the median.
    """
    blocks = [block for block in evidence.scores(1.0) if block]
    means = [math.fsum(each.total for each in block) / max(1, sum(each.entries for each in block)) for block in blocks]
    whole = math.fsum(means) or 1.0
    return of_blocks(blocks, evidence, spread_out([1 - mean / whole for mean in means], sparsity, options.spread))


ALLOCATORS: dict[str, Allocator] = {
    each.name: each
    for each in (
        Allocator(UNIFORM, "", "the same for every linear", "shapes", NoOptions, uniform),
        Allocator(
            "erk",
            "Evci et al., RigL, ICML 2020 (arXiv 1911.11134), section 3; Mocanu et al., SET, 2018",
            "small linears stay denser, by the sum of their sides over the product",
            "shapes",
            NoOptions,
            erk,
        ),
        Allocator(
            "global-magnitude",
            "Han et al., NeurIPS 2015 (arXiv 1506.02626)",
            "one threshold of |W| for all linears",
            "weights",
            NoOptions,
            global_magnitude,
        ),
        Allocator(
            "lamp",
            "Lee et al., Layer-adaptive Sparsity for Magnitude-based Pruning, ICLR 2021 (arXiv 2010.07611), section 3",
            "one threshold of the magnitude over that of all larger ones of the linear",
            "weights",
            NoOptions,
            lamp,
        ),
        Allocator(
            "owl",
            "Yin et al., Outlier Weighed Layerwise Sparsity, ICML 2024 (arXiv 2310.05175), section 3.3",
            "blocks with more outliers among their Wanda scores stay denser",
            "tokens",
            OwlOptions,
            owl,
        ),
        Allocator(
            "dlp",
            "Dynamic Layerwise Pruning, ICML 2025, as its published code has it",
            "blocks with larger Wanda scores become sparser",
            "tokens",
            DlpOptions,
            dlp,
        ),
        Allocator(
            "alphapruning",
            "Lu et al., AlphaPruning, NeurIPS 2024, section 3",
            "blocks whose spectra have heavier tails stay denser",
            "weights",
            AlphaPruningOptions,
            alphapruning,
        ),
        Allocator(
            "mosaic",
            "Mosaic: composite projection pruning, 2025, its projection ratios",
            "OWL for each projection by itself, over the blocks",
            "tokens",
            MosaicOptions,
            mosaic,
        ),
        Allocator(
            "error-knapsack",
            "billhook; in the manner of SPDY (Frantar & Alistarh, ICML 2022)",
            "the smallest sum of the linears' relative errors, as Wanda estimates them",
            "tokens",
            KnapsackOptions,
            error_knapsack,
        ),
        Allocator(
            "neuronal",
            "Cunegatti et al., NeuronAl, TMLR 2025 (arXiv 2411.07066), as the authors' code has it",
            "that slope over the blocks, and that spread over rows, which change the norms of activations least",
            "candidates",
            NeuronAlOptions,
            neuronal,
        ),
        Allocator(
            "sv-nup",
            "Sun et al., SV-NUP, 2025 (arXiv 2505.01731); a reconstruction from its abstract",
            "blocks with larger Shapley values, in sliding windows of blocks, stay denser",
            "candidates",
            SvNupOptions,
            sv_nup,
        ),
        Allocator(
            "ecoflap",
            "Sung et al., ECoFLaP, ICLR 2024 (arXiv 2310.02998), its zeroth-order variant, by block",
            "blocks keep the more, the more the loss changes along a random direction",
            "candidates",
            EcoflapOptions,
            ecoflap,
        ),
        Allocator(
            "besa",
            "Xu et al., BESA, ICLR 2024 (arXiv 2402.16880), its layer-wise form; Adam in the place of Prodigy",
            "blocks alike; within each, the sparsities that cost its output least, learnt by gradients",
            "gradients",
            BesaOptions,
            besa,
        ),
    )
}
