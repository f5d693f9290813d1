"""What the workers of a run exchange in the middle of a block, as one small protocol.

Workers are SPMD: all make the same calls in the same order. ``cluster`` implements the protocol over Ray; ``Alone`` is
the one-process version.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from billhook.layerworkers import scratch
from billhook.layerworkers.scratch import bands
from billhook.layerworkers.stopwatch import Stopwatch

Message = Any
"""Nested tuples, lists and dicts of plain values and numpy arrays. Received arrays may be read-only."""


class Collective(Protocol):
    """The workers that act together; ranks count from 0 within the group."""

    @property
    def rank(self) -> int:
        """This worker's rank."""

    @property
    def size(self) -> int:
        """How many workers act together."""

    def exchange(self, outgoing: Mapping[int, Message]) -> dict[int, Message]:
        """Send each message of ``outgoing`` to its rank; return what was sent to this rank, by sender, in rank order.

        Every rank of the group must call it, with or without messages. A message to oneself comes back as it is.
        """

    def subgroup(self, ranks: Sequence[int]) -> Collective:
        """Return the group made of ``ranks`` (ascending, this worker among them)."""


class Alone:
    """The group of one worker."""

    rank = 0
    size = 1

    def exchange(self, outgoing: Mapping[int, Message]) -> dict[int, Message]:
        """Return ``outgoing``: the only receiver is the sender."""
        return dict(outgoing)

    def subgroup(self, ranks: Sequence[int]) -> Alone:
        """Return the same group: there is no smaller one."""
        assert list(ranks) == [0]
        return self


class Counted:
    """A group that tells how many bytes this worker moves to others, itself and through its subgroups, and how long.

    The bytes are those of the arrays in messages to other ranks; an array that is sent to several counts once for
    each. The few numbers and names beside the arrays, and what carries the messages, are not counted.
    """

    def __init__(self, group: Collective, count: Callable[[int], None], watch: Stopwatch):
        """count: called with the bytes moved in each exchange."""
        self._group, self._count, self._watch = group, count, watch

    @property
    def rank(self) -> int:
        """This worker's rank."""
        return self._group.rank

    @property
    def size(self) -> int:
        """How many workers act together."""
        return self._group.size

    def exchange(self, outgoing: Mapping[int, Message]) -> dict[int, Message]:
        """Exchange as the group does, and count."""
        self._count(sum(_array_bytes(message) for rank, message in outgoing.items() if rank != self.rank))
        with self._watch.part("moving"):
            return self._group.exchange(outgoing)

    def subgroup(self, ranks: Sequence[int]) -> Counted:
        """Return the subgroup, counted together with this group."""
        return Counted(self._group.subgroup(ranks), self._count, self._watch)


def _array_bytes(message: Message) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(message) if isinstance(leaf, np.ndarray))


def all_gather(group: Collective, message: Message) -> list[Message]:
    """Return every rank's message, in rank order."""
    received = group.exchange(dict.fromkeys(range(group.size), message))
    return [received[rank] for rank in range(group.size)]


def broadcast(group: Collective, root: int, message: Message) -> Message:
    """Return the root's message on every rank; the others' are ignored."""
    outgoing = dict.fromkeys(range(group.size), message) if group.rank == root else {}
    return group.exchange(outgoing)[root]


def gather_to(group: Collective, root: int, message: Message) -> list[Message]:
    """Return every rank's message, in rank order, on the root, and an empty list elsewhere."""
    received = group.exchange({root: message})
    return [received[rank] for rank in range(group.size)] if group.rank == root else []


@dataclass(frozen=True)
class Load:
    """What each receiver of a broadcast is sent."""

    size_bytes: int
    exchanges: int

    def __add__(self, other: Load) -> Load:
        return Load(self.size_bytes + other.size_bytes, self.exchanges + other.exchanges)


def tensor_load(shape: tuple[int, ...], item_bytes: int = 4) -> Load:
    """Return what :func:`broadcast_tensor_` sends to each receiver."""
    return Load(item_bytes * math.prod(shape), sum(1 for _ in bands(shape, item_bytes)))


def broadcast_tensor_(group: Collective, root: int, tensor: Tensor) -> None:
    """Overwrite ``tensor`` with the root's, in place, a band of rows at a time, so that little is under way at once."""
    if group.size == 1:
        return
    for start, stop in bands(tensor.shape, tensor.element_size()):
        band = tensor[start:stop]
        message = as_bytes(band) if group.rank == root else None
        received = broadcast(group, root, message)
        if group.rank != root:
            band.copy_(from_bytes(received, band))


Rows = tuple[int, int]
"""Start and stop row; equal where a worker has none."""

Band = tuple[int, int, int]
"""Number of a tensor among several, and the rows of it that start and stop."""


def messages(shares: Sequence[tuple[tuple[int, ...], int]]) -> list[list[Band]]:
    """Deal rows out to messages of at most :data:`billhook.layerworkers.scratch.BAND_BYTES`, or one row, in order.

    shares: shape and bytes of an entry of each tensor, of which there may be no rows.
    """
    dealt: list[list[Band]] = []
    room = 0
    for number, (shape, item_bytes) in enumerate(shares):
        for start, stop in bands(shape, item_bytes):
            size_bytes = (stop - start) * item_bytes * math.prod(shape[1:])
            if size_bytes > room:
                dealt.append([])
                room = scratch.BAND_BYTES
            dealt[-1].append((number, start, stop))
            room -= size_bytes
    return dealt


def gather_rows_(group: Collective, tensors: Sequence[Tensor], ranges: Sequence[Sequence[Rows]]) -> None:
    """Overwrite the rows that other ranks have with theirs, in place: a message of each rank at a time.

    ranges: of each tensor, the rows of each rank.
    """
    if group.size == 1:
        return
    shares = [
        [tensor[slice(*own[rank])] for tensor, own in zip(tensors, ranges, strict=True)] for rank in range(group.size)
    ]
    dealt = [messages([(tuple(share.shape), share.element_size()) for share in of_rank]) for of_rank in shares]
    for together in zip_longest(*dealt, fillvalue=[]):
        parts = [
            [of_rank[number][start:stop] for number, start, stop in message]
            for of_rank, message in zip(shares, together, strict=True)
        ]
        received = all_gather(group, [as_bytes(part) for part in parts[group.rank]])
        for rank, of_rank in enumerate(parts):
            if rank != group.rank:
                for part, array in zip(of_rank, received[rank], strict=True):
                    part.copy_(from_bytes(array, part))
        del received  # before the next ones come


def as_bytes(tensor: Tensor) -> np.ndarray[Any, Any]:
    """Return a tensor's bytes as a numpy array, which knows no bfloat16."""
    return tensor.cpu().contiguous().view(torch.uint8).numpy()


def from_bytes(array: np.ndarray[Any, Any], like: Tensor) -> Tensor:
    """Return a copy of :func:`as_bytes`'s tensor, on the CPU, in the shape and dtype of ``like``."""
    return torch.from_numpy(np.array(array)).view(like.dtype).view(like.shape)
