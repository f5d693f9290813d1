"""SV-NUP: blocks by their Shapley values in sliding windows. A reconstruction: see :func:`sv_nup`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from billhook.layerworkers.candidates import Prune
from billhook.layerworkers.errors import OptionError
from billhook.orchestrator.allocation.contract import Candidate, Evidence, check_samples, check_spread, spread_out

Player = TypeVar("Player")

WIDEST = 8
"""Blocks of a window at most: it takes twice as many candidates with each."""


@dataclass(frozen=True)
class SvNupOptions:
    """Options of SV-NUP; ours, since the authors' were not to be had."""

    samples: int = 8
    """Calibration samples that pass the candidates, the first ones; all, where there are fewer."""
    window: int = 3
    """Consecutive blocks whose contributions are told from each other, 1 to 8."""
    spread: float = 0.08
    """Half the distance of the sparsest block from the densest; between 0 and 0.5."""

    def __post_init__(self) -> None:
        check_samples(self.samples)
        check_spread(self.spread)
        if not 1 <= self.window <= WIDEST:
            raise OptionError(f"window={self.window}: expected 1 to {WIDEST} blocks, for example 3")


def shapley(players: Sequence[Player], value: Callable[[frozenset[Player]], float]) -> dict[Player, float]:
    """Return each player's Shapley value (Shapley, 1953): its mean contribution over all orders of joining.

    ``sum_S |S|! (w - |S| - 1)! / w! (v(S + i) - v(S))`` over all sets S of the other players.
    """
    found = {}
    for player in players:
        others = [other for other in players if other != player]
        found[player] = math.fsum(
            (value(frozenset({*joined, player})) - value(frozenset(joined)))
            / (len(players) * math.comb(len(others), size))
            for size in range(len(players))
            for joined in itertools.combinations(others, size)
        )
    return found


def windows_of(blocks: Sequence[int], size: int) -> list[tuple[int, ...]]:
    """Return all runs of so many consecutive blocks; of fewer blocks there is one."""
    size = min(size, len(blocks))
    return [tuple(blocks[first : first + size]) for first in range(len(blocks) - size + 1)]


def contributions(windows: Sequence[Sequence[int]], loss_without: Mapping[frozenset[int], float]) -> dict[int, float]:
    """Return each block's Shapley value, the mean over the windows that it is in.

    loss_without: the loss where these blocks are pruned and all others dense; a set of blocks of a window is worth
    minus the loss where the window's other blocks are pruned.
    """
    found: dict[int, list[float]] = {}
    for window in windows:
        whole = frozenset(window)

        def value(dense: frozenset[int], whole: frozenset[int] = whole) -> float:
            return -loss_without[whole - dense]

        for block, own in shapley(window, value).items():
            found.setdefault(block, []).append(own)
    return {block: math.fsum(own) / len(own) for block, own in found.items()}


def sv_nup(evidence: Evidence, sparsity: float, options: SvNupOptions) -> list[float]:
    """Return sparsities by OWL's map of the blocks' Shapley values: blocks that contribute more stay denser.

    The abstract says that contributions are Shapley values, approximated by sliding windows, and that sparsities follow
    them. What is worth how much, the windows, their size and the map are our reconstruction.
    """
    blocks = evidence.pruned_blocks
    windows = windows_of(blocks, options.window)
    sets = dict.fromkeys(
        frozenset(pruned)
        for window in windows
        for size in range(len(window) + 1)
        for pruned in itertools.combinations(window, size)
    )
    candidates: list[Candidate] = [{block: Prune(sparsity) for block in sorted(pruned)} for pruned in sets]
    losses = evidence.losses(candidates, options.samples)
    found = contributions(windows, dict(zip(sets, losses, strict=True)))
    own = spread_out([found[block] for block in blocks], sparsity, options.spread)
    of_block = dict(zip(blocks, own, strict=True))
    return [of_block[block] for block in evidence.blocks]
