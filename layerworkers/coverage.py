"""Experts that few calibration tokens are sent to, and what is done instead of fitting them to these alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from billhook.layerworkers.collective import Collective, all_gather
from billhook.layerworkers.experts import Experts
from billhook.layerworkers.methods import METHODS
from billhook.layerworkers.tasks import Coverage, LinearTask


def summed(tokens: Sequence[int], group: Collective) -> list[int]:
    """Return how many tokens each expert is sent on all workers, given those on this one."""
    return [sum(counts) for counts in zip(*all_gather(group, list(tokens)), strict=True)]


def starved_experts(experts: Experts, tokens: Sequence[int], coverage: Coverage) -> frozenset[int]:
    """Return the experts that are sent too few tokens: none is too few in any case."""
    needed = max(1.0, coverage.tokens_per_channel * experts.widest)
    return frozenset(number for number, count in enumerate(tokens) if count < needed)


def instead(linear: LinearTask, fallback: str) -> LinearTask:
    """Return what is done to a linear of a starved expert that is not left dense."""
    if fallback == "magnitude":
        return replace(linear, method="magnitude", options=METHODS["magnitude"].options())
    return linear
