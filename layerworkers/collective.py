"""What the workers of a run exchange in the middle of a block, as one small protocol.

Workers are SPMD: all make the same calls in the same order. ``cluster`` implements the protocol over Ray; ``Alone`` is
the one-process version.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from billhook.layerworkers import scratch
from billhook.layerworkers.scratch import bands
from billhook.layerworkers.stopwatch import Stopwatch

T = TypeVar("T")

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


def broadcast_bands(
    group: Collective, root: int, count: int, pack: Callable[[int], Message], take: Callable[[int, Message], object]
) -> None:
    """Give the root's messages, so many bands of something, to every other rank, a few at a time.

    Each receiver is sent one of these, and passes it on to the others: what goes through the busiest connection is then
    twice all messages at most, however many receivers there are. See :func:`broadcast_rounds`.

    pack: returns a band's message, on the root. take: is given each band's message, on the others.
    """
    receivers = [rank for rank in range(group.size) if rank != root]
    for together in broadcast_rounds(range(count), len(receivers)):
        if len(together) == 1:
            message = broadcast(group, root, pack(together[0]) if group.rank == root else None)
            if group.rank != root:
                take(together[0], message)
            continue
        first = dict(zip(receivers, together, strict=False))
        sent = group.exchange({rank: pack(band) for rank, band in first.items()} if group.rank == root else {})
        own = sent.get(root) if group.rank != root else None
        others = [rank for rank in receivers if rank != group.rank]
        passed = group.exchange({} if own is None else dict.fromkeys(others, own))
        if group.rank != root:
            for rank, band in first.items():
                take(band, own if rank == group.rank else passed[rank])


def broadcast_rounds(bands: Sequence[T], receivers: int) -> list[Sequence[T]]:
    """Return which bands are under way at the same time: one for each receiver; one alone is sent to all directly."""
    return [bands[start : start + receivers] for start in range(0, len(bands), receivers)] if receivers else []


def busiest_bytes(bands: Sequence[int], receivers: int) -> int:
    """Return what goes through the busiest connection of each exchange of :func:`broadcast_bands`, all together."""
    busiest = 0
    for together in broadcast_rounds(bands, receivers):
        everything = sum(together)
        passed_on = max(
            (receivers - 1) * max(together), everything - (min(together) if receivers == len(together) else 0)
        )
        busiest += receivers * everything if len(together) == 1 else everything + passed_on
    return busiest


def broadcast_tensor_(group: Collective, root: int, tensor: Tensor) -> None:
    """Overwrite ``tensor`` with the root's, in place, a band of rows at a time, so that little is under way at once."""
    parts = [tensor[start:stop] for start, stop in bands(tensor.shape, tensor.element_size())]
    broadcast_bands(
        *(group, root, len(parts)),
        lambda number: as_bytes(parts[number]),
        lambda number, received: parts[number].copy_(from_bytes(received, parts[number])),
    )


@dataclass(frozen=True)
class Load:
    """What each receiver of broadcasts gets: of each message, or tensor, the bytes of its bands."""

    messages: tuple[tuple[int, ...], ...]

    @property
    def size_bytes(self) -> int:
        """All together."""
        return sum(map(sum, self.messages))

    def __add__(self, other: Load) -> Load:
        return Load(self.messages + other.messages)


def tensor_load(shape: tuple[int, ...], item_bytes: int = 4) -> Load:
    """Return what each receiver is sent by :func:`broadcast_tensor_`."""
    row_bytes = item_bytes * math.prod(shape[1:])
    return Load((tuple((stop - start) * row_bytes for start, stop in bands(shape, item_bytes)),))


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

    Where only few have any, others pass theirs on: see :func:`are_passed_on`. ranges: of each tensor, the rows of each
    rank.
    """
    if group.size == 1:
        return
    shares = [
        [tensor[slice(*own[rank])] for tensor, own in zip(tensors, ranges, strict=True)] for rank in range(group.size)
    ]
    shapes = [[(tuple(share.shape), share.element_size()) for share in of_rank] for of_rank in shares]
    dealt = [messages(of_rank) for of_rank in shapes]

    def parts(rank: int, message: Sequence[Band]) -> list[Tensor]:
        return [shares[rank][number][start:stop] for number, start, stop in message]

    def take(rank: int, message: Sequence[Band], received: Message) -> None:
        for part, array in zip(parts(rank, message), received, strict=True):
            part.copy_(from_bytes(array, part))

    sizes = [[message_bytes(shape, each) for each in own] for shape, own in zip(shapes, dealt, strict=True)]
    if are_passed_on(sizes):
        for rank, own in enumerate(dealt):
            broadcast_bands(
                *(group, rank, len(own)),
                lambda number, rank=rank, own=own: list(map(as_bytes, parts(rank, own[number]))),  # type: ignore[misc]
                lambda number, received, rank=rank, own=own: take(rank, own[number], received),  # type: ignore[misc]
            )
        return
    for together in zip_longest(*dealt, fillvalue=[]):
        received = all_gather(group, list(map(as_bytes, parts(group.rank, together[group.rank]))))
        for rank, message in enumerate(together):
            if rank != group.rank:
                take(rank, message, received[rank])
        del received  # before the next ones come


def message_bytes(shares: Sequence[tuple[tuple[int, ...], int]], message: Sequence[Band]) -> int:
    """Return the bytes of one of the :func:`messages` of these shares."""
    return sum((stop - start) * shares[number][1] * math.prod(shares[number][0][1:]) for number, start, stop in message)


def are_passed_on(sizes: Sequence[Sequence[int]]) -> bool:
    """Whether so few ranks have messages, given the bytes of those of each, that others had better pass theirs on."""
    receivers = len(sizes) - 1
    return sum(busiest_bytes(own, receivers) for own in sizes) < receivers * max(map(sum, sizes))


def as_bytes(tensor: Tensor) -> np.ndarray[Any, Any]:
    """Return a tensor's bytes as a numpy array, which knows no bfloat16."""
    return tensor.cpu().contiguous().view(torch.uint8).numpy()


def from_bytes(array: np.ndarray[Any, Any], like: Tensor) -> Tensor:
    """Return a copy of :func:`as_bytes`'s tensor, on the CPU, in the shape and dtype of ``like``."""
    return torch.from_numpy(np.array(array)).view(like.dtype).view(like.shape)
