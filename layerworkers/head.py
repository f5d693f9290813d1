"""The product with the head matrix, which is never held whole: forward, and back to its input.

Legend: H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from billhook.layerworkers.shards import TensorEntry, read_rows
from billhook.layerworkers.transfer import check_finite

HEAD_SLICE_BYTES = 64 << 20
"""Bytes of the head matrix that are held at once."""


class Head:
    """The head matrix [V, H] on disk, as a linear map."""

    def __init__(self, entry: TensorEntry):
        self._entry = entry

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return the logits [..., V] of hidden states [..., H]; gradients go back to these.

        Raises:
            InputError: when a row holds NaN or infinity.
        """
        logits: Tensor = _Product.apply(hidden, self)  # type: ignore[no-untyped-call]
        return logits

    def times(self, hidden: Tensor) -> Tensor:
        """Return ``hidden @ M^T``, [..., V]."""
        logits = hidden.new_empty(*hidden.shape[:-1], self._entry.shape[0])
        for start, stop, weight in self._slices(hidden):
            logits[..., start:stop] = functional.linear(hidden, weight)
        return logits

    def back(self, gradient: Tensor) -> Tensor:
        """Return ``gradient @ M``, [..., H], summed over the slices in float32."""
        total = gradient.new_zeros(*gradient.shape[:-1], self._entry.shape[1], dtype=torch.float32)
        for start, stop, weight in self._slices(gradient):
            total += gradient[..., start:stop] @ weight
        return total.to(gradient.dtype)

    def _slices(self, like: Tensor) -> Iterator[tuple[int, int, Tensor]]:
        """Yield rows of the matrix (start, stop, [rows, H]), in the dtype and on the device of ``like``."""
        entry = self._entry
        rows = max(256, HEAD_SLICE_BYTES // (entry.size_bytes // entry.shape[0]))
        for start in range(0, entry.shape[0], rows):
            stop = min(start + rows, entry.shape[0])
            read = read_rows(entry, start, stop)
            check_finite(entry, read)
            yield start, stop, read.to(like.device, like.dtype)


class _Product(torch.autograd.Function):
    """Reads the matrix once more to go back, rather than hold what was read."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Head) -> Tensor:
        ctx.head = head
        return head.times(hidden)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.head.back(gradients[0]), None
