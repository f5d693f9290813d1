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
    counts_R = torch.full((len(score_RC),), count)
    if _has_loop(score_RC):
        return _below_in_rows(score_RC, counts_R)
    return _up_to(score_RC, torch.kthvalue(score_RC, count, dim=1, keepdim=True).values, counts_R)


def smallest_by_row(score_RC: Tensor, counts_R: Tensor) -> Tensor:
    """Return the mask [R, C] of the smallest entries of each row of ``score_RC``: as many as its own of ``counts_R``.

    counts_R: [R] int64, on the CPU.
    """
    assert len(counts_R) == len(score_RC), (len(counts_R), score_RC.shape)  # the loop looks up one for each row
    if _has_loop(score_RC):
        return _below_in_rows(score_RC, counts_R)
    last_R1 = (counts_R - 1).clamp_(min=0).to(score_RC.device)[:, None]
    return _up_to(score_RC, score_RC.sort(dim=1).values.gather(1, last_R1), counts_R)


def _below_in_rows(score_RC: Tensor, counts_R: Tensor) -> Tensor:
    mask_RC = torch.empty(score_RC.shape, dtype=torch.bool)
    compiled(_rows_loop)(_bits(score_RC).view(score_RC.shape).numpy(), counts_R.numpy(), mask_RC.numpy())
    return mask_RC


def _up_to(score_RC: Tensor, threshold_R1: Tensor, counts_R: Tensor) -> Tensor:
    """Return the mask of what is below each row's threshold, and of as much of what equals it as its count has room."""
    below_RC = score_RC < threshold_R1
    ties_RC = score_RC == threshold_R1
    wanted_R1 = counts_R.to(score_RC.device)[:, None] - below_RC.sum(dim=1, keepdim=True)
    return below_RC | (ties_RC & (ties_RC.cumsum(dim=1) <= wanted_R1))


def smallest_in_groups(score_RC: Tensor, keep: int, group: int) -> Tensor:
    """Return the mask [R, C] of the ``group - keep`` smallest in every ``group`` consecutive columns (N:M, N kept)."""
    if _has_loop(score_RC):
        score_RC = score_RC.contiguous()
        mask_RC = torch.empty(score_RC.shape, dtype=torch.bool)
        compiled(_groups_loop)(score_RC.view(-1, group).numpy(), group - keep, mask_RC.view(-1, group).numpy())
        return mask_RC
    return smallest_in_rows(score_RC.reshape(-1, group), group - keep).view_as(score_RC)


def zero_where_(values_RC: Tensor, mask_RC: Tensor) -> None:
    """Set the entries of ``values_RC`` at which ``mask_RC`` is true to 0, in place; both are contiguous."""
    if _has_loop(values_RC):
        compiled(_zero_loop)(values_RC.view(-1).numpy(), mask_RC.view(-1).numpy())
    else:
        values_RC.masked_fill_(mask_RC, 0.0)


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


def _has_loop(values: Tensor) -> bool:
    return values.device.type == "cpu" and values.dtype == torch.float32


def _bits(score: Tensor) -> Tensor:
    assert score.dtype == torch.float32, score.dtype  # the loops write as many entries as they see
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


def _rows_loop(bits: Any, counts: Any, mask: Any) -> None:
    """Halve, for each row, the range in which the key of its last smallest lies: each pass counts vectors."""
    rows, columns = bits.shape
    key = np.empty(columns, dtype=np.int32)
    for r in range(rows):
        count = counts[r]
        low, high = np.int32(2147483647), np.int32(-2147483648)
        for c in range(columns):
            b = bits[r, c]
            signed = np.int32(0) if b == -2147483648 else (np.int32(b ^ 0x7FFFFFFF) if b < 0 else b)
            key[c] = signed
            low, high = min(low, signed), max(high, signed)
        while low < high:
            middle = np.int32((np.int64(low) + np.int64(high)) >> 1)
            reached = np.int32(0)
            for c in range(columns):
                reached += np.int32(key[c] <= middle)
            if reached >= count:
                high = middle
            else:
                low = np.int32(middle + 1)
        wanted = np.int32(count)
        for c in range(columns):
            below = key[c] < low
            mask[r, c] = below
            wanted -= np.int32(below)
        for c in range(columns):
            if wanted == 0:
                break
            if key[c] == low:
                mask[r, c] = True
                wanted -= np.int32(1)


LANES = 128
"""Groups that lie beside each other, so that one instruction compares several; known to the compiler."""


def _groups_loop(score: Any, remove: int, mask: Any) -> None:
    """Remove what fewer than ``remove`` of its group come before: of equal scores the lower index does."""
    groups, width = score.shape
    lane = np.zeros((width, LANES), dtype=np.float32)
    before = np.zeros((width, LANES), dtype=np.int32)
    for first in range(0, groups, LANES):
        count = min(LANES, groups - first)  # the rest of the lanes is compared as well, and not looked at
        for g in range(count):
            for i in range(width):
                lane[i, g] = score[first + g, i]
        before[:] = 0
        for i in range(width):
            for k in range(i):
                for g in range(LANES):
                    is_later = lane[k, g] <= lane[i, g]
                    before[i, g] += is_later
                    before[k, g] += not is_later
        for g in range(count):
            for i in range(width):
                mask[first + g, i] = before[i, g] < remove


def _zero_loop(values: Any, mask: Any) -> None:
    zero = np.float32(0.0)
    for i in range(values.shape[0]):
        values[i] = zero if mask[i] else values[i]
