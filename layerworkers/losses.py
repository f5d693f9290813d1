"""What a model's predictions of a window are worth, and how far they are from another model's.

Legend: T tokens, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from billhook.layerworkers.errors import NotFiniteError
from billhook.layerworkers.tasks import Sample, WindowComparison, WindowLoss

TARGETS_AT_ONCE = 128
"""Targets whose log-probabilities are held in float32 at once."""


def window_loss(logits_TV: Tensor, sample: Sample, device: torch.device) -> WindowLoss:
    """Return the mean next-token cross-entropy of a window.

    Raises:
        RunError: when a logit is not finite.
    """
    targets = torch.tensor(sample.tokens[1:], device=device)
    parts = zip(torch.split(logits_TV[:-1], TARGETS_AT_ONCE), torch.split(targets, TARGETS_AT_ONCE), strict=True)
    nats = math.fsum(_cross_entropy(_checked(part, sample), wanted) for part, wanted in parts)
    return WindowLoss(sample.index, nats / len(targets), len(targets))


def loss_gradient(logits_TV: Tensor, sample: Sample, device: torch.device) -> Tensor:
    """Return the gradient of a window's summed next-token cross-entropy by its logits, in their dtype.

    That is ``softmax(logits_t) - onehot(target_t)``, and 0 behind the last target.

    Raises:
        RunError: when a logit is not finite.
    """
    targets = torch.tensor(sample.tokens[1:], device=device)
    gradient_TV = torch.zeros_like(logits_TV)
    parts = zip(
        *(torch.split(each, TARGETS_AT_ONCE) for each in (logits_TV[:-1], gradient_TV[:-1], targets)), strict=True
    )
    for part, into, wanted in parts:
        probabilities = _checked(part, sample).softmax(-1)
        probabilities[torch.arange(len(wanted), device=device), wanted] -= 1.0
        into.copy_(probabilities)
    return gradient_TV


def window_comparison(
    reference_TV: Tensor, logits_TV: Tensor, sample: Sample, device: torch.device
) -> WindowComparison:
    """Return how far a model's predictions of a window are from those of a reference.

    The divergence is ``sum_v p_v log(p_v / q_v)``, p being the reference's probabilities (Kullback and Leibler, 1951),
    in float32, with sums over tokens in float64. Of equal logits the first one counts as the largest.

    Raises:
        RunError: when a logit is not finite.
    """
    targets = torch.tensor(sample.tokens[1:], device=device)
    own, others, divergences, agreeing = [], [], [], 0
    for p, q, wanted in zip(
        torch.split(reference_TV[:-1], TARGETS_AT_ONCE),
        torch.split(logits_TV[:-1], TARGETS_AT_ONCE),
        torch.split(targets, TARGETS_AT_ONCE),
        strict=True,
    ):
        reference, logits = _checked(p, sample), _checked(q, sample)
        others.append(_cross_entropy(reference, wanted))
        own.append(_cross_entropy(logits, wanted))
        agreeing += int((reference.argmax(-1) == logits.argmax(-1)).sum())
        log_p, log_q = reference.log_softmax(-1), logits.log_softmax(-1)
        log_q.sub_(log_p).mul_(log_p.exp_()).neg_()
        divergences.append(float(log_q.sum(-1).double().sum()))
    count = len(targets)
    loss = WindowLoss(sample.index, math.fsum(own) / count, count)
    return WindowComparison(loss, math.fsum(others) / count, math.fsum(divergences) / count, agreeing)


def _checked(logits: Tensor, sample: Sample) -> Tensor:
    """Return logits in float32."""
    if not torch.isfinite(logits).all():
        raise NotFiniteError(
            f"the logits of window {sample.index} are not finite in {logits.dtype}; try --dtype float32"
        )
    return logits.float()


def _cross_entropy(logits: Tensor, targets: Tensor) -> float:
    return float(functional.cross_entropy(logits, targets, reduction="sum"))
