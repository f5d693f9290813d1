"""The request: what is asked for, with every default filled in, which decides every byte of the output."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from billhook.layerworkers.besa import Learning
from billhook.layerworkers.candidates import Deviation
from billhook.layerworkers.errors import OptionError, UnsupportedModelError
from billhook.layerworkers.machine import library_versions, machine_facts
from billhook.layerworkers.methods import COLLECT, UNLISTED, Method, Solver, method_named
from billhook.layerworkers.observing import ScoreFacts
from billhook.layerworkers.patterns import NM, Pattern, PerRow, Unstructured, parse_pattern
from billhook.layerworkers.shards import TensorEntry
from billhook.layerworkers.statistics import GRAM, covering
from billhook.orchestrator.allocation import (
    ALLOCATORS,
    UNIFORM,
    Allocation,
    Candidate,
    Evidence,
    Matrix,
    allocated,
    check_allocator,
    read_allocation,
)
from billhook.orchestrator.allocation.magnitudes import Histogram
from billhook.orchestrator.allocation.outlets import Outlet
from billhook.orchestrator.calibration import default_seqlen
from billhook.orchestrator.checkpoint import Checkpoint
from billhook.orchestrator.collected import Collected, as_collected, open_collected, statistics_files
from billhook.orchestrator.command import flag_of
from billhook.orchestrator.layout import Layout, Linear
from billhook.orchestrator.model import Model, open_model
from billhook.orchestrator.paths import user_path
from billhook.orchestrator.recipe import SOLVING_KEYS, Recipe, Value, checked_options
from billhook.orchestrator.turns import check_turns

DATA_KEYS = (
    *("field", "samples", "seqlen", "seed", "bos", "fit", "correction", "reconstruct", "reconstruct_rate"),
    "partition_samples",
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
    allocation: Allocation | None
    """None: every linear loses the same share; or what each loses takes more than shapes to say."""
    others: dict[str, Solver] = dataclasses.field(default_factory=dict)
    """What solves the linears that another method than the recipe's is for, by their names on disk."""
    collected: Collected | None = None
    """What the linears are solved on, where no samples are run."""
    collects: Checkpoint | None = None
    """Files of statistics that are written, instead of a sparse checkpoint."""

    @property
    def written(self) -> Checkpoint:
        """The files that are written, and those that are copied beside them."""
        return self.collects or self.model.checkpoint

    @property
    def copied(self) -> tuple[TensorEntry, ...]:
        """The tensors outside the blocks that go into what is written."""
        return () if self.collects else self.model.layout.rest

    @property
    def method(self) -> Method:
        """The pruning method."""
        return method_named(self.recipe.method)

    def solver_of(self, linear: Linear) -> Solver:
        """Return what one of the linears is solved by."""
        return self.others.get(linear.disk_name) or Solver(self.method, self.method.options(**self.options))

    def pattern_of(self, linear: Linear) -> Pattern:
        """Return what one of the linears loses."""
        if self.allocation is None:
            return self.pattern
        if (counts := self.allocation.by_row.get(linear.disk_name)) is not None:
            return PerRow(tuple(counts), linear.shape[1])
        return Unstructured(self.allocation.sparsity_of(linear.disk_name))

    @property
    def is_allocated(self) -> bool:
        """Whether it is known what each linear loses."""
        return self.allocation is not None or self.recipe.allocation == UNIFORM

    @property
    def streams(self) -> int:
        """In how many ways each sample is carried through the blocks: sparse, and dense beside it where that is needed.

        It is where linears are corrected, or blocks reconstructed.
        """
        return 2 if self.recipe.correction or self.recipe.reconstruct else 1

    @property
    def samples(self) -> int:
        """Calibration samples; 0 for methods that need none, or where their statistics were collected before."""
        if self.collected is not None:
            return 0
        methods = [self.method, *(solver.method for solver in self.others.values())]
        needed = self.recipe.reconstruct or any(method.statistic is not None for method in methods)
        return self.recipe.samples if needed else 0

    @property
    def useful_workers(self) -> int:
        """As many as have something to do."""
        if self.samples:
            return self.partitions
        if self.collected is None:
            return 1
        most_rows = max((linear.shape[0] for linears in self.linears for linear in linears), default=1)
        return -(-most_rows // (self.recipe.partition_rows or 1))

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
        options = {each.method.name: dataclasses.asdict(each.options) for each in self.others.values()}
        recipe["methods"] = {regex: [name, options.get(name)] for regex, name in self.recipe.methods.items()}
        recipe["allocation_options"] = {}
        if self.recipe.allocation in ALLOCATORS:
            options = allocator_options(self.recipe.allocation, self.recipe.allocation_options)
            recipe["allocation_options"] = dataclasses.asdict(options)
        recipe["calibration"] = calibration_sha256
        if self.collected is not None:
            recipe["collected"] = self.collected.sha256
        if self.allocation is not None:
            recipe["allocation"] = f"{self.allocation.name} {self.allocation.sha256}"
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
    _check_collected(recipe)
    solvers = _solvers(recipe)
    options = dataclasses.asdict(solvers[recipe.method].options)
    pattern = parse_pattern(recipe.pattern, recipe.sparsity)
    asked_sparsity, route_all = recipe.sparsity, recipe.route == "all"
    opened = open_model(
        model, recipe.device, recipe.dtype, recipe.trust_remote_code, weights_needed, device_needed, route_all
    )
    seqlen = recipe.seqlen or default_seqlen(opened.config)
    check_context(seqlen, opened.config)
    recipe = recipe.model_copy(
        update={
            "sparsity": float(pattern.sparsity),
            "options": options,
            "fit": _fit(recipe),
            "correction": _correction(recipe),
            "device": opened.device,
            "dtype": opened.dtype,
            "seqlen": seqlen,
            "partition_rows": recipe.partition_rows or (256 if opened.device == "cpu" else 2048),
        }
    )
    chosen, skipped = _choose(opened.layout, recipe, opened.checkpoint.folder)
    _check_widths(chosen, pattern)
    _check_gradients(recipe, opened, solvers.values())
    others = {
        linear.disk_name: solvers[method]
        for linears in chosen
        for linear in linears
        if (method := _method_of(recipe, linear)) != recipe.method
    }
    _check_methods(recipe, chosen)
    check_turns(recipe, opened, chosen, lambda linear: others.get(linear.disk_name) or solvers[recipe.method])
    collected = None if recipe.collected is None else open_collected(recipe.collected, opened, chosen)
    if collected is not None:
        chosen, skipped, starved = as_collected(collected, chosen, skipped)
        others |= starved
    allocation = _allocation(recipe, pattern, chosen, asked_sparsity)
    if allocation is not None and asked_sparsity is None:
        pattern = Unstructured(allocation.sparsity)
        recipe = recipe.model_copy(update={"sparsity": float(pattern.sparsity)})
    return Request(opened, recipe, pattern, options, chosen, skipped, allocation, others, collected)


def make_collecting_request(model: str | Path, recipe: Recipe) -> Request:
    """Fill in a recipe for a model whose statistics are to be collected: no weight is read.

    Raises:
        InputError: for anything wrong with the model or the recipe, as keys that have nothing to do with collecting.
    """
    for key in SOLVING_KEYS:
        if getattr(recipe, key) != Recipe.model_fields[key].get_default(call_default_factory=True):
            raise OptionError(f"{flag_of(key)}: is for solving; leave it out here, and give it to 'billhook solve'")
    request = make_request(model, recipe.model_copy(update={"method": "magnitude", "sparsity": 0.0}))
    recipe = request.recipe.model_copy(update={"method": COLLECT.name, "fit": COLLECT.fit})
    return dataclasses.replace(
        request, recipe=recipe, options={}, collects=statistics_files(request.model, request.linears)
    )


def _check_collected(recipe: Recipe) -> None:
    """Check that a recipe asks for nothing of statistics collected before that only samples can tell.

    Raises:
        OptionError: where it does.
    """
    if recipe.collected is None:
        return
    for key in ("calibration", "fit", "correction", "reconstruct"):
        if (value := getattr(recipe, key)) not in (None, "auto", 0):
            raise OptionError(
                f"--collected: runs no samples, which {flag_of(key)} {value} is about; leave out one of them"
            )


def _solvers(recipe: Recipe) -> dict[str, Solver]:
    """Return the methods that the recipe names, each with those of the recipe's options that it has.

    Raises:
        OptionError: for an unknown method, an option that none of them has, or a value of the wrong kind or range.
    """
    _compile("--method-for", tuple(recipe.methods))
    if set(UNLISTED) & {recipe.method, *recipe.methods.values()}:
        raise OptionError(
            f"--method {COLLECT.name}: is a command of its own, 'billhook collect'; see 'billhook methods'"
        )
    kinds = {name: method_named(name) for name in (recipe.method, *recipe.methods.values())}
    fields = {name: {field.name for field in dataclasses.fields(kind.options)} for name, kind in kinds.items()}
    known = set[str]().union(*fields.values())
    return {
        name: Solver(
            kind,
            checked_options(
                *("--set", name, kind.options),
                {key: value for key, value in recipe.options.items() if key in fields[name] or key not in known},
            ),
        )
        for name, kind in kinds.items()
    }


def _fit(recipe: Recipe) -> str:
    """Return to which inputs linears are fitted; what was collected is of dense blocks."""
    if recipe.collected is not None:
        return "dense-block"
    return method_named(recipe.method).fit if recipe.fit == "auto" else recipe.fit


def _method_of(recipe: Recipe, linear: Linear) -> str:
    """Return the name of the method that a linear is solved by."""
    found = (method for regex, method in recipe.methods.items() if re.search(regex, linear.disk_name))
    return next(found, recipe.method)


def _check_methods(recipe: Recipe, chosen: tuple[tuple[Linear, ...], ...]) -> None:
    """Check that every regex for a method finds a linear, and that those with one input ask for one statistic.

    Raises:
        OptionError: where not.
    """
    names = [linear.disk_name for linears in chosen for linear in linears]
    for regex in _compile("--method-for", tuple(recipe.methods)):
        if not any(regex.search(name) for name in names):
            raise OptionError(
                f"--method-for {regex.pattern}: matches none of the {len(names)} linears to prune, whose names are "
                f"like {names[0]}"
            )
    for linears in chosen:
        inputs: dict[int, list[Linear]] = {}
        for linear in linears:
            inputs.setdefault(linear.group, []).append(linear)
        for together in inputs.values():
            methods = dict.fromkeys(_method_of(recipe, linear) for linear in together)
            asked = [statistic for name in methods if (statistic := method_named(name).statistic) is not None]
            if asked and covering(asked) is None:
                raise OptionError(
                    f"--method-for: {', '.join(linear.disk_name for linear in together)} have one input, of which "
                    f"{' and '.join(methods)} ask for different statistics; give them methods that go together"
                )


def _correction(recipe: Recipe) -> float:
    """Return the share of earlier errors that targets take back.

    Raises:
        OptionError: where the recipe's method cannot be corrected.
    """
    method = method_named(recipe.method)
    if recipe.collected is not None:
        return 0.0
    if not (share := method.correction if recipe.correction is None else recipe.correction):
        return 0.0
    names = (recipe.method, *recipe.methods.values())
    flag = f"--correction {share:g}"
    if (method.fit if recipe.fit == "auto" else recipe.fit) != "lockstep":
        raise OptionError(
            f"{flag}: what is fitted to the dense block sees no error of earlier linears; use --fit lockstep, or "
            "--correction 0"
        )
    for name, statistic in ((name, method_named(name).statistic) for name in names):
        if statistic is None or not GRAM.covers(statistic):
            needs = "no calibration" if statistic is None else statistic.name
            raise OptionError(
                f"{flag}: needs the Gram matrix of the inputs, which does not give what the method {name} asks for "
                f"({needs}); say --correction 0, or choose another method"
            )
    return share


def _allocation(
    recipe: Recipe, pattern: Pattern, chosen: tuple[tuple[Linear, ...], ...], asked_sparsity: float | None
) -> Allocation | None:
    """Return what each linear loses, where that is not the same share, and can be said from shapes or a file."""
    if recipe.allocation == UNIFORM:
        allocator_options(UNIFORM, recipe.allocation_options)
        return None
    if isinstance(pattern, NM):
        raise OptionError(
            f"--allocation {recipe.allocation}: the pattern {pattern} takes the same share of every linear; use it "
            "with --pattern unstructured"
        )
    if user_path(recipe.allocation).is_file():
        if recipe.allocation_options:
            raise OptionError(f"--set-allocation: the file {recipe.allocation} has no options")
        found = read_allocation(recipe.allocation, matrices_of(recipe, chosen))
        if asked_sparsity is not None and abs(float(found.sparsity) - asked_sparsity) > 1e-3:
            raise OptionError(
                f"--sparsity {asked_sparsity} contradicts --allocation {recipe.allocation}, which removes "
                f"{float(found.sparsity):.4f}; leave --sparsity out"
            )
        return found
    allocator_options(recipe.allocation, recipe.allocation_options)
    if ALLOCATORS[recipe.allocation].needs != "shapes":
        return None
    return allocation_of(recipe, chosen, pattern)


def allocation_of(
    recipe: Recipe,
    chosen: tuple[tuple[Linear, ...], ...],
    pattern: Pattern,
    histograms: Callable[[], list[Histogram]] | None = None,
    spectra: Callable[[], list[list[np.ndarray]]] | None = None,
    scores: Callable[[float], Sequence[Sequence[ScoreFacts]]] | None = None,
    deviations: Callable[[Sequence[Candidate], int], Sequence[Sequence[Deviation]]] | None = None,
    losses: Callable[[Sequence[Candidate], int], Sequence[float]] | None = None,
    learnt: Callable[[Learning, int], Sequence[float]] | None = None,
    outlets: Sequence[Outlet | None] = (),
) -> Allocation:
    """Return what the recipe's allocator makes of the linears chosen.

    What may be looked at: see :class:`Evidence`; None, or nothing, where the allocator does not need it.
    """

    def unknown(*_: object) -> Any:
        raise AssertionError(f"{recipe.allocation} looks at what it does not declare")

    evidence = Evidence(
        matrices_of(recipe, chosen),
        histograms or unknown,
        spectra or unknown,
        scores or unknown,
        [index for index, linears in enumerate(chosen) for _ in linears],
        deviations or unknown,
        losses or unknown,
        learnt or unknown,
        outlets=outlets,
    )
    options = allocator_options(recipe.allocation, recipe.allocation_options)
    return allocated(recipe.allocation, options, evidence, pattern.sparsity)


def matrices_of(recipe: Recipe, chosen: tuple[tuple[Linear, ...], ...]) -> list[Matrix]:
    """Return the weights to be pruned, with the steps in which their methods take entries of them."""

    def step(linear: Linear) -> int:
        return linear.shape[0] if method_named(_method_of(recipe, linear)).within_rows else 1

    return [Matrix(linear.disk_name, *linear.shape, step(linear)) for linears in chosen for linear in linears]


def allocator_options(name: str, given: dict[str, Value]) -> Any:
    """Check an allocator's name and options; return these, defaults included.

    Raises:
        InputError: for an unknown allocator or option, or a value of the wrong kind or range.
    """
    check_allocator(name)
    return checked_options("--set-allocation", name, ALLOCATORS[name].options, given)


def check_context(seqlen: int, config: Any) -> None:
    """Check that windows of ``seqlen`` tokens fit the model.

    Raises:
        InputError: when they do not.
    """
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if context is not None and seqlen > context:
        raise OptionError(f"--seqlen {seqlen}: the model's context is {context} tokens; use at most that")


def _choose(layout: Layout, recipe: Recipe, folder: Path) -> tuple[tuple[tuple[Linear, ...], ...], tuple[Linear, ...]]:
    include, exclude = _compile("--include", recipe.include), _compile("--exclude", recipe.exclude)
    everything = [linear for block in layout.blocks for linear in block.linears]
    if not everything:
        raise UnsupportedModelError(f"{folder}: the blocks have no linear layers that billhook knows how to prune")
    for option, patterns in (("--include", include), ("--exclude", exclude)):
        for pattern in patterns:
            if not any(pattern.search(linear.disk_name) for linear in everything):
                raise OptionError(
                    f"{option} {pattern.pattern}: matches none of the {len(everything)} linears, whose names are like "
                    f"{everything[0].disk_name}"
                )

    def wanted(linear: Linear) -> bool:
        name = linear.disk_name
        included = not include or any(pattern.search(name) for pattern in include)
        return included and not any(pattern.search(name) for pattern in exclude)

    chosen = tuple(tuple(linear for linear in block.linears if wanted(linear)) for block in layout.blocks)
    if not any(chosen):
        raise OptionError("--include and --exclude together leave nothing to prune")
    return chosen, tuple(linear for linear in everything if not wanted(linear))


def _compile(option: str, patterns: tuple[str, ...]) -> list[re.Pattern[str]]:
    compiled = []
    for pattern in patterns:
        try:
            compiled.append(re.compile(pattern))
        except re.error as error:
            raise OptionError(f"{option} {pattern}: is not a regular expression: {error}") from error
    return compiled


def _check_gradients(recipe: Recipe, model: Model, solvers: Iterable[Solver]) -> None:
    """Check that what asks for gradients can have them.

    Raises:
        OptionError: where not.
    """
    methods = [solver.method for solver in solvers]
    asking = [each.name for each in methods if each.rounds is not None or each.model_gradients is not None]
    if asking and recipe.collected is not None:
        raise OptionError(
            f"--method {asking[0]}: asks for gradients, which --collected has none of; choose another method, or use "
            "'billhook prune'"
        )
    if not any(block.experts for block in model.layout.blocks):
        return
    flags = [f"--reconstruct {recipe.reconstruct}"] * (recipe.reconstruct > 0) + [f"--method {name}" for name in asking]
    for flag in flags:
        raise OptionError(
            f"{flag}: {model.checkpoint.folder} is a mixture of experts, through whose routing goes no gradient; leave "
            "it out"
        )


def _check_widths(chosen: tuple[tuple[Linear, ...], ...], pattern: Pattern) -> None:
    if isinstance(pattern, NM):
        for linear in (linear for block in chosen for linear in block):
            if linear.shape[1] % pattern.group:
                raise OptionError(
                    f"--pattern {pattern}: {linear.disk_name} is {linear.shape[1]} wide, which {pattern.group} does "
                    "not divide; --exclude it or choose another pattern"
                )
