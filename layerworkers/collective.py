"""What the workers of a run exchange in the middle of a block, as one small protocol.

Workers are SPMD: all make the same calls in the same order. ``cluster`` implements the protocol over Ray; ``Alone`` is
the one-process version.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

Message = Any
"""Nested tuples, lists and dicts of plain values and numpy arrays. Received arrays are read-only."""


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
