"""Bytes in use at some moment, by where they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Need:
    """Bytes in use at some moment."""

    device: int
    ram: int
    """Beside the device's."""
    disk: int
    """In scratch files."""

    def __add__(self, other: Need) -> Need:
        return Need(self.device + other.device, self.ram + other.ram, self.disk + other.disk)


def at_tier(tier: str, size: int) -> Need:
    """Return a need of ``size`` bytes on ``device``, ``ram`` or ``disk``."""
    return Need(size if tier == "device" else 0, size if tier == "ram" else 0, size if tier == "disk" else 0)


def sum_of(needs: Sequence[Need]) -> Need:
    """Return the needs together."""
    return Need(sum(n.device for n in needs), sum(n.ram for n in needs), sum(n.disk for n in needs))


def larger(one: Need, other: Need) -> Need:
    """Return the larger of each."""
    return Need(max(one.device, other.device), max(one.ram, other.ram), max(one.disk, other.disk))
