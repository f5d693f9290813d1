"""How a command ends early; every message names what, what was found, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Sequence


class InputError(ValueError):
    """The request or the input is wrong; nothing was changed (exit code 2)."""


class RunError(RuntimeError):
    """The run failed and can be resumed (exit code 1)."""


class BlockLostError(RunError):
    """The block in progress is lost, for a reason that may pass: it is worth another try with new workers."""


class Interrupted(Exception):  # noqa: N818 - not an error: the user or the system asked for it
    """The run was asked to end and can be resumed (exit code 130)."""


def nearest(name: str, known: Sequence[str]) -> str:
    """Return ``" (did you mean X?)"`` for the nearest known name, or nothing."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""
