"""The command that asks for what a run was asked for."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from billhook.orchestrator.recipe import Recipe, Resources

SETTERS = {"options": "--set", "allocation_options": "--set-allocation", "methods": "--method-for"}
"""Flags of the keys that are mappings of names to values."""


def flag_of(key: str) -> str:
    """Return the flag of a key of :class:`Recipe` or :class:`Resources`."""
    return SETTERS.get(key, f"--{key.replace('_', '-')}")


def prune_words(asked: Mapping[str, Any], output: str, from_block: int | None = None) -> list[str]:
    """Return the words of the ``billhook prune`` that asks for the same: what is at its default is left out.

    asked: ``model``, ``recipe`` and ``resources``, as the journal keeps them.
    """
    words = ["billhook", "prune", asked["model"], "-o", output]
    if from_block is not None:
        words += ["--from-block", str(from_block)]
    for model, values in ((Recipe, asked["recipe"]), (Resources, asked["resources"])):
        defaults = model.model_validate({}).model_dump(mode="json")
        for key, default in defaults.items():
            if values.get(key, default) != default:
                words += _option(key, values[key])
    return words


def as_line(words: list[str]) -> str:
    """Return words as a shell takes them."""
    return shlex.join(words)


def _option(key: str, value: Any) -> Iterator[str]:
    flag = flag_of(key)
    if value is True:
        yield flag
    elif isinstance(value, Mapping):
        for name, each in value.items():
            yield from (flag, f"{name}={each}")
    elif isinstance(value, list | tuple):
        for each in value:
            yield from (flag, str(each))
    elif key in ("vram", "ram", "disk"):
        yield from (flag, _size(value))
    else:
        yield from (flag, str(value))


def _size(size_bytes: int) -> str:
    """Return a size with the largest unit that it is a whole number of."""
    for exponent in range(5, 0, -1):
        for base, infix in ((1024, "i"), (1000, "")):
            if size_bytes % base**exponent == 0:
                return f"{size_bytes // base**exponent}{'KMGTP'[exponent - 1]}{infix}B"
    return f"{size_bytes / 1024}KiB"  # exact: a division by a power of two
