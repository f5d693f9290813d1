"""Where the rows of a linear show later in its block: in the channels of which input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from billhook.layerworkers.block_facts import InputGroup
from billhook.orchestrator.layout import Linear


@dataclass(frozen=True)
class Outlet:
    """The input in whose channels the rows of a linear show."""

    name: str
    """On disk, of the first of the linears that have this input."""
    heads: int = 1
    """Heads that the rows belong to, where each is for several that the channels belong to."""

    def rows(self, of_channels: np.ndarray, rows: int) -> np.ndarray:
        """Return values of the rows [R], given those of the channels [C]: the mean over the heads that one is for."""
        if len(of_channels) == rows:
            return of_channels
        mean: np.ndarray = of_channels.reshape(self.heads, -1, rows // self.heads).mean(axis=1).ravel()
        return mean


def outlets_of(
    linears: Sequence[Linear], groups: Sequence[InputGroup], heads: int, key_heads: int
) -> list[Outlet | None]:
    """Return where the rows of some linears of a block show; None where that is not known.

    It is the first later input that has as many channels; of keys and values, which have fewer heads than queries, the
    first that has as many more as there are more heads. What shows in experts is not known; within an expert it is.

    heads, key_heads: of the attention, for queries, and for keys and values.
    """
    first_of: dict[int, Linear] = {}
    for linear in linears:
        first_of.setdefault(linear.group, linear)

    def expert(number: int) -> tuple[str, int]:
        return groups[number].experts, groups[number].number

    def outlet(linear: Linear) -> Outlet | None:
        rows = linear.shape[0]
        later = [
            first
            for number, first in first_of.items()
            if number > linear.group and expert(number) == expert(linear.group)
        ]
        for first in later:
            if first.shape[1] == rows:
                return Outlet(first.disk_name)
        for first in later:
            if rows % key_heads == 0 and first.shape[1] * key_heads == rows * heads:
                return Outlet(first.disk_name, key_heads)
        return None

    return [outlet(linear) for linear in linears]
