"""The collective of ``layerworkers`` over Ray: workers call each other, and each keeps what has come until it asks.

Small messages travel inside the call. Large arrays travel through Ray's object store, straight from the sender's node
to the receiver's, in small pieces, and the call carries their references. Between workers of one machine everything
travels over a line of their own.
"""

from __future__ import annotations

import pickle
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
from torch.utils._pytree import tree_map

from billhook.cluster.lines import Lines, pickled, unpickled
from billhook.layerworkers.collective import Message

PIECE_BYTES = 16 << 20
"""Largest object that is put into the store."""

INLINE_BYTES = 512 << 10
"""Arrays up to this size travel inside the call."""

ARGUMENT_BYTES = 64 << 10
"""An argument of a call that is larger than 100 KiB would go through the store; so a message is cut into several."""

LOOK_SECONDS = 2.0
"""How often one who waits for others looks whether what it sent them has arrived."""


@dataclass(frozen=True)
class Envelope:
    """A message on its way, or that there is none."""

    body: bytes = b""
    """Pickled, as it came in a call."""
    references: Sequence[Any] = ()
    """To the objects in Ray's store that belong to it."""
    parts: Sequence[bytearray] = ()
    """Pickled, as it came over a line."""

    @property
    def empty(self) -> bool:
        """Whether there is no message."""
        return not self.body and not self.parts


Key = tuple[tuple[int, ...], int, int]
"""Members of a group, number of their exchange, and who sent it."""


class Inbox:
    """What other workers have sent to this one; another thread than that which asks for it puts it there."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._envelopes: dict[Key, Envelope] = {}
        self._lost: list[str] = []

    def put(self, key: Key, envelope: Envelope) -> None:
        """Take in what has come."""
        with self._changed:
            self._envelopes[key] = envelope
            self._changed.notify_all()

    def put_parts(self, parts: Sequence[bytearray]) -> None:
        """Take in what has come over a line: a key and a message."""
        key, *message = parts
        self.put(pickle.loads(key), Envelope(parts=message))

    def lose(self, reason: str) -> None:
        """Note that something may never come."""
        self._lost.append(reason)

    def take(self, keys: Sequence[Key], seconds: float) -> list[Envelope] | None:
        """Return what has come under all ``keys``, and keep it no longer; None when not all has come in time.

        Raises:
            ConnectionError: when it has not, and something was lost before: others then know by now who has died.
        """
        lost = list(self._lost)
        with self._changed:
            if self._changed.wait_for(lambda: all(key in self._envelopes for key in keys), seconds):
                return [self._envelopes.pop(key) for key in keys]
        if lost:
            raise ConnectionError(lost[0])
        return None


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

    def __init__(
        self, actors: Sequence[Any], inbox: Inbox, members: Sequence[int], me: int, lines: Lines | None = None
    ):
        """actors: all workers of the pool, with a method ``post(key, references, *body)`` that fills their inbox.

        members: numbers of those that act together, this one's ``me`` among them. lines: to those that it reaches.
        """
        self._actors, self._inbox, self._members, self._me = actors, inbox, tuple(members), me
        self._lines = lines
        self._exchanges = 0
        self._subgroups: dict[tuple[int, ...], RayCollective] = {}
        self._posts: list[Any] = []
        """Sent, by this group and its subgroups, and not known to have arrived."""

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
            self._subgroups[members] = RayCollective(self._actors, self._inbox, members, self._me, self._lines)
            self._subgroups[members]._posts = self._posts
        return self._subgroups[members]

    def exchange(self, outgoing: Mapping[int, Message]) -> dict[int, Message]:
        """Send to all and wait for all, with or without a message; see the protocol.

        Raises:
            ray.exceptions.RayError, ConnectionError: when another worker could not be reached, now or before.
        """
        received = {rank: message for rank, message in outgoing.items() if rank == self.rank}
        if self.size == 1:
            return received
        self._exchanges += 1
        others = [rank for rank in range(self.size) if rank != self.rank]
        packed: dict[int, Envelope] = {}  # a message to several ranks is put into the store once
        key = (self._members, self._exchanges, self._me)
        for rank in others:
            member = self._members[rank]
            if self._lines is not None and self._lines.reach(member):
                self._lines.send(member, [pickle.dumps(key), *(pickled(outgoing[rank]) if rank in outgoing else ())])
                continue
            envelope = Envelope()
            if rank in outgoing:
                message = outgoing[rank]
                envelope = packed[id(message)] = packed.get(id(message)) or _pack(message)
            body = envelope.body
            pieces = [body[start : start + ARGUMENT_BYTES] for start in range(0, len(body), ARGUMENT_BYTES)]
            self._posts.append(self._actors[member].post.remote(key, list(envelope.references), *pieces))
        keys = [(self._members, self._exchanges, self._members[rank]) for rank in others]
        while (envelopes := self._inbox.take(keys, LOOK_SECONDS)) is None:
            self._look()
        received |= {rank: _unpack(each) for rank, each in zip(others, envelopes, strict=True) if not each.empty}
        self._look()
        return dict(sorted(received.items()))

    def settle(self) -> None:
        """Wait until all that was sent has arrived.

        Raises:
            ray.exceptions.RayError: when some of it could not.
        """
        posts = list(self._posts)
        self._posts.clear()
        ray.get(posts)

    def _look(self) -> None:
        if self._posts:
            arrived, self._posts[:] = ray.wait(self._posts, num_returns=len(self._posts), timeout=0)
            ray.get(arrived)


def _pack(message: Message) -> Envelope:
    """Put the message's large arrays into the store, and pickle the rest."""
    references: list[Any] = []

    def pack(leaf: Any) -> Any:
        if not isinstance(leaf, np.ndarray) or leaf.nbytes <= INLINE_BYTES:
            return leaf
        flat = np.ascontiguousarray(leaf).reshape(-1)
        step = max(1, PIECE_BYTES // flat.itemsize)
        first = len(references)
        references.extend(ray.put(flat[start : start + step]) for start in range(0, flat.size, step))
        return _Parcel(first, len(references) - first, leaf.dtype, leaf.shape)

    return Envelope(pickle.dumps(tree_map(pack, message)), references)


def _unpack(envelope: Envelope) -> Message:
    if envelope.parts:
        return unpickled(envelope.parts)

    def unpack(leaf: Any) -> Any:
        if not isinstance(leaf, _Parcel):
            return leaf
        arrays = ray.get(list(envelope.references)[leaf.first : leaf.first + leaf.pieces])
        flat = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
        return flat.reshape(leaf.shape)

    return tree_map(unpack, pickle.loads(envelope.body))
