"""The collective of ``layerworkers`` over Ray: a mailbox actor that all workers of a pool meet at.

Arrays travel through Ray's object store, straight from the sender's node to the receiver's, in small pieces; the
mailbox sees their references only.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
from torch.utils._pytree import tree_map

from billhook.cluster.mailbox import Envelope
from billhook.layerworkers.collective import Message

PIECE_BYTES = 16 << 20
"""Largest object that is put into the store."""

INLINE_BYTES = 32 << 10
"""Arrays up to this size travel inside the message."""


@dataclass(frozen=True)
class _Parcel:
    """Stands for an array that travels as objects of its own."""

    first: int
    """Place of its first piece among the pieces of the message."""
    pieces: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]


class RayCollective:
    """Workers of one pool, or some of them; see :class:`billhook.layerworkers.collective.Collective`."""

    def __init__(self, mailbox: Any, members: Sequence[int], me: int):
        self._mailbox, self._members, self._me = mailbox, tuple(members), me
        self._exchanges = 0
        self._subgroups: dict[tuple[int, ...], RayCollective] = {}

    @property
    def rank(self) -> int:
        """This worker's place among the members."""
        return self._members.index(self._me)

    @property
    def size(self) -> int:
        """The number of members."""
        return len(self._members)

    def subgroup(self, ranks: Sequence[int]) -> RayCollective:
        """Return the group of ``ranks``; the same object each time, so that its exchanges are numbered through."""
        members = tuple(self._members[rank] for rank in ranks)
        if members == self._members:
            return self
        if members not in self._subgroups:
            self._subgroups[members] = RayCollective(self._mailbox, members, self._me)
        return self._subgroups[members]

    def exchange(self, outgoing: Mapping[int, Message]) -> dict[int, Message]:
        """Send and receive through the mailbox; see the protocol."""
        own = {rank: message for rank, message in outgoing.items() if rank == self.rank}
        if self.size == 1:
            return own
        self._exchanges += 1
        posted: dict[int, Envelope] = {}
        by_identity: dict[int, Envelope] = {}  # a message to several ranks is put into the store once
        for rank, message in outgoing.items():
            if rank != self.rank:
                if id(message) not in by_identity:
                    by_identity[id(message)] = _pack(message)
                posted[rank] = by_identity[id(message)]
        key = (self._members, self._exchanges)
        received = ray.get(self._mailbox.exchange.remote(key, self.rank, self.size, posted))
        everything = {rank: _unpack(envelope) for rank, envelope in received.items()} | own
        return dict(sorted(everything.items()))


def _pack(message: Message) -> Envelope:
    """Put the message's large arrays into the store; pickle the rest, so that the mailbox need not understand it."""
    references: list[Any] = []

    def pack(leaf: Any) -> Any:
        if not isinstance(leaf, np.ndarray) or leaf.nbytes <= INLINE_BYTES:
            return leaf
        flat = np.ascontiguousarray(leaf).reshape(-1)
        step = max(1, PIECE_BYTES // flat.itemsize)
        first = len(references)
        references.extend(ray.put(flat[start : start + step]) for start in range(0, flat.size, step))
        return _Parcel(first, len(references) - first, leaf.dtype, leaf.shape)

    return pickle.dumps(tree_map(pack, message)), references


def _unpack(envelope: Envelope) -> Message:
    body, references = envelope

    def unpack(leaf: Any) -> Any:
        if not isinstance(leaf, _Parcel):
            return leaf
        arrays = ray.get(references[leaf.first : leaf.first + leaf.pieces])
        flat = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
        return flat.reshape(leaf.shape)

    return tree_map(unpack, pickle.loads(body))
