"""Choosing the smallest scores: exact counts, ties broken by index (the lower index goes first).

Legend: R rows, C columns. A score may be any float32 but NaN; -0.0 ranks as 0.0.
"""

from __future__ import annotations

import torch
from torch import Tensor

KEY_BINS = 1 << 16
"""Bins of each of the two histograms of :func:`high_histogram` and :func:`low_histogram`."""


def smallest_reference(score: Tensor, count: int) -> Tensor:
    """Return the mask, shaped as ``score``, of its ``count`` smallest entries: the specification of all the others."""
    order = torch.sort(score.flatten() + 0.0, stable=True).indices
    mask = torch.zeros(score.numel(), dtype=torch.bool, device=score.device)
    mask[order[:count]] = True
    return mask.view_as(score)


def smallest_in_rows(score_RC: Tensor, count: int) -> Tensor:
    """Return the mask [R, C] of the ``count`` smallest entries of each row of ``score_RC``."""
    if count == 0:
        return torch.zeros_like(score_RC, dtype=torch.bool)
    threshold_R1 = torch.kthvalue(score_RC, count, dim=1, keepdim=True).values
    below_RC = score_RC < threshold_R1
    ties_RC = score_RC == threshold_R1
    wanted_R1 = count - below_RC.sum(dim=1, keepdim=True)
    return below_RC | (ties_RC & (ties_RC.cumsum(dim=1) <= wanted_R1))


def smallest_in_groups(score_RC: Tensor, keep: int, group: int) -> Tensor:
    """Return the mask [R, C] of the ``group - keep`` smallest in every ``group`` consecutive columns (N:M, N kept)."""
    return smallest_in_rows(score_RC.reshape(-1, group), group - keep).view_as(score_RC)


def sortable_keys(score: Tensor) -> Tensor:
    """Map float32 to int64 in [0, 2^32) so that keys compare as the scores do; flat, in index order."""
    bits = (score.flatten() + 0.0).view(torch.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() + (1 << 31)


def high_histogram(keys: Tensor) -> Tensor:
    """Count the ``keys`` by their upper 16 bits: [KEY_BINS] int64."""
    return torch.bincount(keys >> 16, minlength=KEY_BINS)


def low_histogram(keys: Tensor, high: int) -> Tensor:
    """Count by their lower 16 bits those ``keys`` whose upper 16 bits are ``high``: [KEY_BINS] int64."""
    return torch.bincount(keys[(keys >> 16) == high] & 0xFFFF, minlength=KEY_BINS)


def bin_of(histogram: Tensor, count: int) -> tuple[int, int]:
    """Return the bin that holds the ``count``-th smallest (1-based), and how many entries lie in the bins before it."""
    cumulative = histogram.cumsum(0)
    bin_index = int(torch.searchsorted(cumulative, count))
    return bin_index, int(cumulative[bin_index - 1]) if bin_index else 0


def below_with_ties(keys: Tensor, threshold: int, ties_wanted: int) -> Tensor:
    """Return the flat mask of the keys below ``threshold`` and of the first ``ties_wanted`` that equal it."""
    ties = keys == threshold
    return (keys < threshold) | (ties & (ties.cumsum(0) <= ties_wanted))
