"""Wanda's scores of a dense model whose statistics were collected before: no sample is run."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from billhook.layerworkers.collected import read_collected
from billhook.layerworkers.files import read_bytes
from billhook.layerworkers.observing import ScoreFacts, score_facts, score_total
from billhook.layerworkers.shards import TensorEntry
from billhook.layerworkers.statistics import COLUMN_SQUARES
from billhook.layerworkers.transfer import read_finite
from billhook.orchestrator.layout import Linear


def collected_scores(
    inputs: Mapping[str, TensorEntry],
    weights: Mapping[str, TensorEntry],
    linears: Mapping[Linear, str],
    multiple: float,
) -> list[ScoreFacts]:
    """Return the facts of the scores of a block's linears; one weight is in memory at a time.

    inputs: where the statistics of inputs lie, by the first of the linears that share one. weights: by name on disk.
    linears: each with the first of those that share its input. multiple: as of
    :func:`billhook.layerworkers.observing.observe_scores`.

    Raises:
        InputError: when a weight is NaN or infinite.
        RunError: when the disk fails.
    """

    def norms_of(linear: Linear) -> Tensor:
        entry, columns = inputs[linears[linear]], linear.shape[1]
        return read_collected(entry, COLUMN_SQUARES, columns, torch.device("cpu"), read_bytes).sqrt()

    def weight_of(linear: Linear) -> Tensor:
        return read_finite(weights[linear.disk_name], read_bytes)

    totals = {linear: score_total(weight_of(linear), norms_of(linear)) for linear in linears}
    entries = sum(linear.shape[0] * linear.shape[1] for linear in linears)
    limit = multiple * math.fsum(totals.values()) / max(entries, 1)
    return [
        score_facts(linear.disk_name, weight_of(linear), norms_of(linear), totals[linear], limit, multiple)
        for linear in linears
    ]
