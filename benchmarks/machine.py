"""The machine that figures come from."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def this_machine() -> dict[str, str | int | None]:
    """Return its processor and cores, and the version of Python."""
    return {"processor": _processor(), "cores": os.cpu_count(), "python": platform.python_version()}


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()
