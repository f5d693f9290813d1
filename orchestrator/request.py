"""The request: what is asked for, with every default filled in, which decides every byte of the output."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from billhook.layerworkers.errors import InputError
from billhook.layerworkers.machine import library_versions, machine_facts
from billhook.layerworkers.methods import Method, method_named
from billhook.layerworkers.patterns import NM, Pattern, parse_pattern
from billhook.orchestrator.calibration import default_seqlen
from billhook.orchestrator.layout import Layout, Linear
from billhook.orchestrator.model import Model, open_model
from billhook.orchestrator.recipe import Recipe, method_options

DATA_KEYS = (
    *("field", "samples", "seqlen", "seed", "bos", "fit", "partition_samples"),
    *("route", "expert_tokens", "expert_fallback"),
)
"""Keys of a recipe that mean nothing to methods without calibration."""


@dataclass(frozen=True)
class Request:
    """What is asked for, with every default filled in: all that the bytes of the output depend on."""

    model: Model
    recipe: Recipe
    pattern: Pattern
    options: dict[str, Any]
    """All options of the method."""
    linears: tuple[tuple[Linear, ...], ...]
    """The linears to prune, by block."""
    skipped: tuple[Linear, ...]
    """Linears in blocks that include and exclude leave dense."""

    @property
    def method(self) -> Method:
        """The pruning method."""
        return method_named(self.recipe.method)

    @property
    def samples(self) -> int:
        """Calibration samples; 0 for methods that need none."""
        return self.recipe.samples if self.method.statistic is not None else 0

    @property
    def partitions(self) -> int:
        """Partitions of the calibration samples."""
        return -(-self.samples // self.recipe.partition_samples)

    @property
    def other_matrices(self) -> tuple[str, ...]:
        """Matrices in blocks that are the weight of no linear: left dense."""
        return tuple(name for block in self.model.layout.blocks for name in block.other_matrices)

    @property
    def unknown(self) -> tuple[str, ...]:
        """Tensors on disk inside a block that are no parameter of it: copied."""
        return tuple(entry.name for block in self.model.layout.blocks for entry in block.others)

    def fingerprint(self, calibration_sha256: str | None) -> dict[str, Any]:
        """Return everything that the bytes of the output depend on, as plain JSON values."""
        recipe = self.recipe.model_dump(mode="json")
        recipe["options"] = self.options
        recipe["calibration"] = calibration_sha256
        if not self.samples:
            for key in DATA_KEYS:
                del recipe[key]
        return {
            "recipe": recipe,
            "checkpoint": self.model.checkpoint.source().sha256,
            "versions": library_versions(),
            "machine": machine_facts(self.model.device),
        }


def make_request(model: str | Path, recipe: Recipe, weights_needed: bool = True, device_needed: bool = True) -> Request:
    """Fill in a recipe for a model: no weight is read.

    weights_needed: if not, a folder that holds a config only will do. device_needed: if not, a device that this machine
    lacks will do.

    Raises:
        InputError: for anything wrong with the model or the recipe.
    """
    options = method_options(recipe.method, recipe.options)
    pattern = parse_pattern(recipe.pattern, recipe.sparsity)
    route_all = recipe.route == "all"
    opened = open_model(
        model, recipe.device, recipe.dtype, recipe.trust_remote_code, weights_needed, device_needed, route_all
    )
    seqlen = recipe.seqlen or default_seqlen(opened.config)
    check_context(seqlen, opened.config)
    recipe = recipe.model_copy(
        update={
            "sparsity": float(pattern.sparsity),
            "options": options,
            "fit": method_named(recipe.method).fit if recipe.fit == "auto" else recipe.fit,
            "device": opened.device,
            "dtype": opened.dtype,
            "seqlen": seqlen,
            "partition_rows": recipe.partition_rows or (256 if opened.device == "cpu" else 2048),
        }
    )
    chosen, skipped = _choose(opened.layout, recipe, opened.checkpoint.folder)
    _check_widths(chosen, pattern)
    return Request(opened, recipe, pattern, options, chosen, skipped)


def check_context(seqlen: int, config: Any) -> None:
    """Check that windows of ``seqlen`` tokens fit the model.

    Raises:
        InputError: when they do not.
    """
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if context is not None and seqlen > context:
        raise InputError(f"--seqlen {seqlen}: the model's context is {context} tokens; use at most that")


def _choose(layout: Layout, recipe: Recipe, folder: Path) -> tuple[tuple[tuple[Linear, ...], ...], tuple[Linear, ...]]:
    include, exclude = _compile("--include", recipe.include), _compile("--exclude", recipe.exclude)
    everything = [linear for block in layout.blocks for linear in block.linears]
    if not everything:
        raise InputError(f"{folder}: the blocks have no linear layers that billhook knows how to prune")
    for option, patterns in (("--include", include), ("--exclude", exclude)):
        for pattern in patterns:
            if not any(pattern.search(linear.disk_name) for linear in everything):
                raise InputError(
                    f"{option} {pattern.pattern}: matches none of the {len(everything)} linears, whose names are like "
                    f"{everything[0].disk_name}"
                )

    def wanted(linear: Linear) -> bool:
        name = linear.disk_name
        included = not include or any(pattern.search(name) for pattern in include)
        return included and not any(pattern.search(name) for pattern in exclude)

    chosen = tuple(tuple(linear for linear in block.linears if wanted(linear)) for block in layout.blocks)
    if not any(chosen):
        raise InputError("--include and --exclude together leave nothing to prune")
    return chosen, tuple(linear for linear in everything if not wanted(linear))


def _compile(option: str, patterns: tuple[str, ...]) -> list[re.Pattern[str]]:
    compiled = []
    for pattern in patterns:
        try:
            compiled.append(re.compile(pattern))
        except re.error as error:
            raise InputError(f"{option} {pattern}: is not a regular expression: {error}") from error
    return compiled


def _check_widths(chosen: tuple[tuple[Linear, ...], ...], pattern: Pattern) -> None:
    if isinstance(pattern, NM):
        for linear in (linear for block in chosen for linear in block):
            if linear.shape[1] % pattern.group:
                raise InputError(
                    f"--pattern {pattern}: {linear.disk_name} is {linear.shape[1]} wide, which {pattern.group} does "
                    "not divide; --exclude it or choose another pattern"
                )
