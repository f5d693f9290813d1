"""In which order the input groups of a block are solved, and which of them together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

from billhook.layerworkers.block_facts import InputGroup

Stage = tuple[InputGroup, ...]
"""Groups whose inputs are all known before a linear of any of them runs: one, or those of several experts."""


def in_stages(groups: Sequence[InputGroup], at_once: Mapping[str, int]) -> list[Stage]:
    """Return the groups of a block in stages, in execution order.

    at_once: how many experts are computed at once, by the name of the experts: the first linears of these form a stage,
    then those that end them.
    """
    begun: dict[str, int] = {}

    def key(position: int, group: InputGroup) -> tuple[int, int, bool]:
        if not group.experts or not group.linears:
            return position, 0, False
        return begun.setdefault(group.experts, position), group.number // at_once[group.experts], group.second

    keyed = sorted(((key(position, group), group) for position, group in enumerate(groups)), key=lambda each: each[0])
    return [tuple(group for _, group in together) for _, together in groupby(keyed, key=lambda each: each[0])]
