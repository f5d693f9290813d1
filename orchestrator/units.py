"""Sizes and times as people read them."""

from __future__ import annotations


def gibibytes(size_bytes: float) -> str:
    """Return a size as text, in GiB from 0.1 GiB up and in MiB below."""
    return f"{size_bytes / 2**30:.2f} GiB" if size_bytes >= 2**30 / 10 else f"{size_bytes / 2**20:.1f} MiB"


def duration(seconds: float) -> str:
    """Return a time as text, in seconds, minutes, hours or days."""
    for limit, unit, name in ((120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.2g} {name}" if seconds / unit < 10 else f"{seconds / unit:.0f} {name}"
    return f"{seconds / 86_400:.1f} days"
