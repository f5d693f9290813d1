"""What a window's logits take, and gradients by them."""

from __future__ import annotations

import torch

from billhook.layerworkers.head import HEAD_SLICE_BYTES
from billhook.layerworkers.losses import TARGETS_AT_ONCE
from billhook.orchestrator.model import Model


def item_bytes(model: Model) -> int:
    """Return the bytes of a number in the compute dtype."""
    item: int = getattr(torch, model.dtype).itemsize
    return item


def logits_bytes(model: Model, seqlen: int) -> int:
    """Return what a window's logits take, with all that is made of them.

    The logits, with the copies that capping makes; a slice of the head in both dtypes; and of 128 targets the logits
    in float32, their log-probabilities, and whether they are finite.
    """
    entry, vocabulary = model.layout.stem.head, model.layout.stem.head.shape[0]
    capped = getattr(model.config.get_text_config(), "final_logit_softcapping", None) is not None
    logits = (3 if capped else 1) * item_bytes(model) * seqlen * vocabulary
    return logits + 3 * min(HEAD_SLICE_BYTES, entry.size_bytes) + 12 * TARGETS_AT_ONCE * vocabulary


def logits_gradient_bytes(model: Model, seqlen: int) -> int:
    """Return what it takes to go from a window's logits back to what the head is applied to.

    There are the logits, and twice as many gradients where these are scaled, capped, or biased on the way.
    """
    return logits_bytes(model, seqlen) + 2 * item_bytes(model) * seqlen * model.layout.stem.head.shape[0]
