"""The two kinds of failure that a user meets; every message names what, what was found, and what to do."""

from __future__ import annotations


class InputError(ValueError):
    """The request or the input is wrong; nothing was changed (exit code 2)."""


class RunError(RuntimeError):
    """The run failed and can be resumed (exit code 1)."""
