"""Choosing the smallest scores: exact counts, ties broken by index (the lower index goes first).

Legend: R rows, C columns. A score may be any float32 but NaN; -0.0 ranks as 0.0.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from billhook.kernels.compiled import compiled

KEY_LEVELS = (11, 11, 10)
"""Bits of a key that each of the histograms resolves which find a threshold: they fit the fastest cache."""


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
    if score_RC.device.type == "cpu":
        score_RC = score_RC.contiguous()
        mask_RC = torch.empty_like(score_RC, dtype=torch.bool)
        compiled(_rows_loop)(score_RC.numpy(), count, mask_RC.numpy())
        return mask_RC
    threshold_R1 = torch.kthvalue(score_RC, count, dim=1, keepdim=True).values
    below_RC = score_RC < threshold_R1
    ties_RC = score_RC == threshold_R1
    wanted_R1 = count - below_RC.sum(dim=1, keepdim=True)
    return below_RC | (ties_RC & (ties_RC.cumsum(dim=1) <= wanted_R1))


def smallest_in_groups(score_RC: Tensor, keep: int, group: int) -> Tensor:
    """Return the mask [R, C] of the ``group - keep`` smallest in every ``group`` consecutive columns (N:M, N kept)."""
    if score_RC.device.type == "cpu":
        score_RC = score_RC.contiguous()
        mask_RC = torch.zeros_like(score_RC, dtype=torch.bool)
        compiled(_groups_loop)(score_RC.view(-1, group).numpy(), group - keep, mask_RC.view(-1, group).numpy())
        return mask_RC
    return smallest_in_rows(score_RC.reshape(-1, group), group - keep).view_as(score_RC)


def histogram(score: Tensor, known: int, prefix: int, bits: int) -> Tensor:
    """Count, of the scores whose keys begin with ``known`` bits of ``prefix``, the next ``bits``: [2^bits] int64."""
    if score.device.type == "cpu":
        counts = torch.zeros(1 << bits, dtype=torch.int64)
        compiled(_count_loop)(_bits(score).numpy(), known, prefix, bits, counts.numpy())
        return counts
    keys = sortable_keys(score)
    if known:
        keys = keys[keys >> (32 - known) == prefix]
    return torch.bincount((keys >> (32 - known - bits)) & ((1 << bits) - 1), minlength=1 << bits)


def bin_of(histogram: Tensor, count: int) -> tuple[int, int]:
    """Return the bin that holds the ``count``-th smallest (1-based), and how many entries lie in the bins before it."""
    cumulative = histogram.cumsum(0)
    bin_index = int(torch.searchsorted(cumulative, count))
    return bin_index, int(cumulative[bin_index - 1]) if bin_index else 0


def below_with_ties(score: Tensor, threshold: int, ties_wanted: int) -> Tensor:
    """Return the mask of the scores whose key is below ``threshold``, and of the first ``ties_wanted`` equal to it."""
    if score.device.type == "cpu":
        mask = torch.empty(score.shape, dtype=torch.bool)
        compiled(_below_loop)(_bits(score).numpy(), threshold, ties_wanted, mask.view(-1).numpy())
        return mask
    keys = sortable_keys(score)
    ties = keys == threshold
    return ((keys < threshold) | (ties & (ties.cumsum(0) <= ties_wanted))).view_as(score)


def sortable_keys(score: Tensor) -> Tensor:
    """Map float32 to int64 in [0, 2^32) so that keys compare as the scores do; flat, in index order."""
    bits = (score.flatten() + 0.0).view(torch.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() + (1 << 31)


def _bits(score: Tensor) -> Tensor:
    return score.contiguous().view(-1).view(torch.int32)


# The loops below compute the keys of `sortable_keys` on the fly; the bits of -0.0 are the lowest int32.


def _count_loop(bits: Any, known: int, prefix: int, next_bits: int, counts: Any) -> None:
    last = (1 << next_bits) - 1
    for b in bits:
        signed = 0 if b == -2147483648 else (b ^ 0x7FFFFFFF if b < 0 else b)
        key = signed + 2147483648
        if key >> (32 - known) == prefix:
            counts[(key >> (32 - known - next_bits)) & last] += 1


def _below_loop(bits: Any, threshold: int, ties_wanted: int, mask: Any) -> None:
    ties = 0
    for i in range(bits.shape[0]):
        b = bits[i]
        signed = 0 if b == -2147483648 else (b ^ 0x7FFFFFFF if b < 0 else b)
        key = signed + 2147483648
        if key == threshold:
            ties += 1
            mask[i] = ties <= ties_wanted
        else:
            mask[i] = key < threshold


def _rows_loop(score: Any, count: int, mask: Any) -> None:
    rows, columns = score.shape
    for r in range(rows):
        threshold = np.partition(score[r], count - 1)[count - 1]
        wanted = count
        for c in range(columns):
            if score[r, c] < threshold:
                wanted -= 1
        for c in range(columns):
            tie = score[r, c] == threshold and wanted > 0
            if tie:
                wanted -= 1
            mask[r, c] = tie or score[r, c] < threshold


def _groups_loop(score: Any, remove: int, mask: Any) -> None:
    groups, width = score.shape
    for g in range(groups):
        for _ in range(remove):
            best = -1
            for i in range(width):
                if not mask[g, i] and (best < 0 or score[g, i] < score[g, best]):
                    best = i
            mask[g, best] = True
