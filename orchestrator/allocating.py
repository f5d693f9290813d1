"""What each linear loses: found out from the weights or from a pass of the samples through the dense model.

``billhook allocate`` writes it to a file that ``prune`` reads; ``prune`` finds it out by itself where it is told to.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, astuple, replace
from pathlib import Path
from typing import TypeVar, Unpack

import numpy as np

from billhook.cluster.memory import own_bytes
from billhook.layerworkers.besa import Learning
from billhook.layerworkers.candidates import Deviation
from billhook.layerworkers.errors import InputError, OptionError, OutputError
from billhook.layerworkers.machine import library_versions, machine_facts
from billhook.layerworkers.observing import ScoreFacts
from billhook.layerworkers.shards import TensorEntry
from billhook.layerworkers.tasks import ObserveTask
from billhook.orchestrator.allocation import (
    ALLOCATORS,
    UNIFORM,
    Allocation,
    Candidate,
    read_allocation,
    write_allocation,
)
from billhook.orchestrator.allocation.magnitudes import Histogram, histogram
from billhook.orchestrator.allocation.outlets import Outlet, outlets_of
from billhook.orchestrator.allocation.scores import collected_scores
from billhook.orchestrator.allocation.spectra import spectrum, spectrum_bytes
from billhook.orchestrator.budgets import resolve_budgets
from billhook.orchestrator.calibration import Windows, calibration_windows, check_vocabulary, deal_samples
from billhook.orchestrator.events import Progress, Step, no_progress
from billhook.orchestrator.journal import FOLDER
from billhook.orchestrator.learning import learnt_shares
from billhook.orchestrator.passing import Trial
from billhook.orchestrator.paths import user_path
from billhook.orchestrator.planning import Plan, make_plan, with_workers
from billhook.orchestrator.promised_rows import STORED
from billhook.orchestrator.recipe import Resources, RunOptions, read_options
from billhook.orchestrator.request import Request, allocation_of, allocator_options, make_request, matrices_of
from billhook.orchestrator.trying import deviations_of, losses_of
from billhook.orchestrator.workers import PATIENCE_SECONDS, ray_for, reserve_places, start_pool

T = TypeVar("T")


def allocate(
    model: str | Path,
    output: str | Path,
    *,
    recipe: str | Path | None = None,
    progress: Progress | None = None,
    **options: Unpack[RunOptions],
) -> Allocation:
    """Allocate a model's sparsity to its linears and write the table to the file ``output``.

    model: a folder or a Hugging Face hub id. recipe: a YAML file of options; ``options`` win over it. They are those of
    :func:`prune`; what compares the entries of each row by themselves removes as many from each.

    Raises:
        InputError: the request or the input is wrong, or there is something at ``output``; nothing is written.
        RunError: a worker failed.
    """
    asked, resources = read_options(recipe, options)
    target = user_path(output)
    if target.exists():
        raise OutputError(f"--output {output}: exists; choose another file")
    if not target.parent.is_dir():
        raise OutputError(f"--output {output}: there is no folder {target.parent}")
    if asked.allocation == UNIFORM:
        raise OptionError("--allocation: say which, as erk; see 'billhook methods'")
    request = make_request(model, asked)
    needs_tokens = not request.is_allocated and ALLOCATORS[request.recipe.allocation].runs_samples
    windows = windows_of(request) if needs_tokens else None
    report = no_progress if progress is None else progress
    found = allocated(request, resources, windows, target.parent, report).allocation
    assert found is not None
    write_allocation(found, target)
    return found


def windows_of(request: Request) -> Windows | None:
    """Return the calibration samples; None for a method that needs none.

    Raises:
        InputError: when there are not so many.
    """
    if not request.samples:
        return None
    windows = calibration_windows(request.recipe, request.model.checkpoint.folder, request.model.config)
    vocabulary = request.model.layout.stem.embedding.shape[0]
    check_vocabulary(windows, vocabulary, str(request.recipe.calibration))
    return windows


def allocated(
    request: Request,
    resources: Resources,
    windows: Windows | None,
    folder: Path,
    report: Progress,
) -> Request:
    """Return the request with what each linear loses, found out where it is not known yet.

    folder: of the run; what was found out for it by an earlier command is taken from there.

    Raises:
        InputError: when the allocator needs samples, and the method none.
        RunError: a worker failed.
    """
    if request.is_allocated:
        return request
    stored = stored_path(folder, request, windows)
    if stored.is_file():
        with suppress(InputError):  # what cannot be read is found out again
            matrices = matrices_of(request.recipe, request.linears)
            return replace(request, allocation=read_allocation(str(stored), matrices))

    scratch = folder / FOLDER if (folder / FOLDER).is_dir() else None

    def of_weights(found_in: Callable[[TensorEntry], T]) -> list[list[T]]:
        entries = {tensor.entry.name: tensor.entry for block in request.model.layout.blocks for tensor in block.tensors}
        found = []
        for number, block in enumerate(request.linears):
            found.append([found_in(entries[linear.disk_name]) for linear in block])
            report(Step("allocate", number + 1, len(request.linears), ""))
        return found

    def histograms() -> list[Histogram]:
        return [each for block in of_weights(histogram) for each in block]

    def spectra() -> list[list[np.ndarray]]:
        _check_room_for_spectra(request, resources)
        return of_weights(spectrum)

    def scores(multiple: float) -> list[list[ScoreFacts]]:
        if request.collected is not None:
            return _collected_scores(request, multiple, report)
        return dense_scores(make_plan(request, resources, folder), windows, multiple, report, scratch)

    def trial(samples: int) -> Trial:
        assert windows is not None
        parked = user_path(resources.scratch or scratch or tempfile.gettempdir())
        return Trial(request, resources, windows.first(samples), parked)

    def deviations(candidates: Sequence[Candidate], samples: int) -> list[list[Deviation]]:
        return deviations_of(trial(samples), candidates, report)

    def losses(candidates: Sequence[Candidate], samples: int) -> list[float]:
        return losses_of(trial(samples), candidates, report)

    def learnt(learning: Learning, samples: int) -> list[float]:
        return learnt_shares(trial(samples), learning, report)

    allocator = ALLOCATORS[request.recipe.allocation]
    if allocator.needs in ("candidates", "gradients") and request.collected is not None:
        raise OptionError(
            f"--allocation {allocator.name}: passes samples through changed models, and --collected runs none; choose "
            "another allocator, or let 'billhook allocate' write a file for 'solve' to read"
        )
    if allocator.runs_samples and windows is None and request.collected is None:
        raise OptionError(
            f"--allocation {request.recipe.allocation} looks at calibration samples, which --method "
            f"{request.recipe.method} does without; choose another of the two"
        )
    found = allocation_of(
        *(request.recipe, request.linears, request.pattern, histograms, spectra, scores, deviations, losses, learnt),
        outlets=_outlets(request),
    )
    return replace(request, allocation=found)


def _outlets(request: Request) -> list[Outlet | None]:
    """Return where the rows of each linear show."""
    config = request.model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    key_heads = getattr(config, "num_key_value_heads", None)
    if not isinstance(heads, int) or not isinstance(key_heads, int):  # some families have a list of them, some none
        heads = key_heads = 1
    return [
        outlet
        for block, linears in zip(request.model.layout.blocks, request.linears, strict=True)
        for outlet in outlets_of(linears, block.groups, heads, key_heads)
    ]


def _collected_scores(request: Request, multiple: float, report: Progress) -> list[list[ScoreFacts]]:
    assert request.collected is not None
    found = []
    for block, linears, inputs in zip(
        request.model.layout.blocks, request.linears, request.collected.entries, strict=True
    ):
        weights = {tensor.entry.name: tensor.entry for tensor in block.tensors}
        firsts = {linear: block.groups[linear.group].linears[0] for linear in linears}
        found.append(collected_scores(inputs, weights, firsts, multiple))
        report(Step("allocate", block.index + 1, len(request.linears), ""))
    return found


def _check_room_for_spectra(request: Request, resources: Resources) -> None:
    """Check that the largest linear's spectrum can be computed within the budget of this node's memory."""
    names = {linear.disk_name for block in request.linears for linear in block}
    need = own_bytes(os.getpid()) + max(
        spectrum_bytes(tensor.entry)
        for block in request.model.layout.blocks
        for tensor in block.tensors
        if tensor.entry.name in names
    )
    room = resolve_budgets(resources.vram, resources.ram, None, request.model.device, None).ram
    if need > room:
        raise OptionError(
            f"--ram {room >> 20}MiB: --allocation {request.recipe.allocation} needs {-(-need >> 20)}MiB for the "
            "spectrum of the largest linear"
        )


def store(request: Request, windows: Windows | None, output: Path) -> None:
    """Keep what was found out, for the next command that goes on with the run."""
    if request.allocation is None or ALLOCATORS.get(request.recipe.allocation) is None:
        return
    path = stored_path(output, replace(request, allocation=None), windows)
    write_allocation(request.allocation, path)


def stored_path(output: Path, request: Request, windows: Windows | None) -> Path:
    """Return where what was found out for a request that is not allocated yet is kept."""
    recipe = request.recipe
    seen = (recipe.partition_samples, recipe.dtype, recipe.device, recipe.route, recipe.threads)
    made_from = [
        *(request.model.checkpoint.source().sha256, recipe.allocation, str(request.pattern.sparsity)),
        asdict(allocator_options(recipe.allocation, recipe.allocation_options)),
        [astuple(matrix) for matrix in matrices_of(recipe, request.linears)],
        [windows.sha256, *seen] if windows and ALLOCATORS[recipe.allocation].runs_samples else [],
        request.collected.sha256 if request.collected else "",
    ]
    digest = hashlib.sha256(json.dumps(made_from).encode()).hexdigest()
    return output / FOLDER / f"{STORED}-{digest[:16]}.json"


def dense_scores(
    plan: Plan, windows: Windows | None, multiple: float, report: Progress, scratch: Path | None = None
) -> list[list[ScoreFacts]]:
    """Pass the samples through the dense model, on as many workers as the plan has; return each block's scores.

    scratch: folder for what memory has no room for, where the request names none; None: the system's.

    Raises:
        RunError: a worker failed.
    """
    request, workers = plan.request, plan.workers
    model, blocks = request.model, request.model.layout.blocks
    assert windows is not None
    expected = library_versions() | machine_facts(model.device)
    found: list[list[ScoreFacts]] = []
    with ExitStack() as stack:
        stack.enter_context(ray_for(workers, model.device, report))
        places = reserve_places(workers, model.device, workers.count, PATIENCE_SECONDS)
        plan = with_workers(plan, places.size)
        parked = str(user_path(plan.resources.scratch) if plan.resources.scratch else scratch or "")
        setup = model.worker_setup(workers.threads, plan.arrangement.activations, parked)
        pool = stack.enter_context(start_pool(setup, places, expected=expected))
        pool.start(model.layout.stem, deal_samples(windows, request.recipe.partition_samples, pool.size))
        for block, linears, placement in zip(blocks, request.linears, plan.arrangement.placements, strict=True):
            later = blocks[block.index + 1 : block.index + 2] if placement.read_ahead else ()
            task = ObserveTask(
                block.index,
                block.tensors,
                tuple((linear.name, linear.disk_name) for linear in linears),
                request.recipe.partition_samples,
                request.partitions,
                multiple,
                later[0].tensors if later else (),
            )
            found.append(pool.observe_block(task))
            report(Step("allocate", block.index + 1, len(blocks), ""))
    return found
