"""Paths that a user gives."""

from __future__ import annotations

from pathlib import Path

from billhook.layerworkers.errors import OptionError


def user_path(text: str | Path) -> Path:
    """Return a path with ``~`` and links resolved; it need not exist.

    Raises:
        InputError: for an unknown user or a loop of links.
    """
    try:
        return Path(text).expanduser().resolve()
    except (RuntimeError, OSError) as error:
        raise OptionError(f"{text}: is no path: {error}") from error
