"""Samples that pass a model before anything of it is pruned: on which workers, and where their hidden states wait."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING

from billhook.cluster.memory import own_bytes
from billhook.layerworkers.errors import BudgetError
from billhook.layerworkers.machine import library_versions, machine_facts
from billhook.layerworkers.methods import METHODS
from billhook.orchestrator.budgets import DISK_RESERVE_BYTES, free_disk_bytes, resolve_budgets
from billhook.orchestrator.calibration import Windows, deal_samples
from billhook.orchestrator.events import Progress
from billhook.orchestrator.job import BlockWork, Job
from billhook.orchestrator.logits_needs import logits_bytes
from billhook.orchestrator.model import check_gpus, resolve_workers
from billhook.orchestrator.needs import Need, larger
from billhook.orchestrator.placing import Arrangement, DoesNotFitError, arrange
from billhook.orchestrator.planning import block_work
from billhook.orchestrator.probe import measured_rates
from billhook.orchestrator.recipe import Recipe, Resources
from billhook.orchestrator.request import Request
from billhook.orchestrator.workers import PATIENCE_SECONDS, Workers, ray_for, reserve_places, start_pool

if TYPE_CHECKING:
    from billhook.cluster.pool import WorkerPool

Beside = Callable[[BlockWork, Recipe], Need]
"""Returns what is taken on each worker by what is done to a block, beside hidden states between blocks."""


@dataclass(frozen=True)
class Trial:
    """What samples pass, and which."""

    request: Request
    resources: Resources
    windows: Windows
    """The samples that pass."""
    scratch: Path
    """Folder for what memory has no room for."""


@dataclass(frozen=True)
class Load:
    """What it takes to let samples pass."""

    streams: int
    """Hidden states of each sample that are held at once between blocks."""
    beside: Beside
    told: str
    """What it is, for a person whose budgets it exceeds."""
    held_bytes: int = 0
    """What this process will hold of what is found."""
    dense_stream: bool = False
    """Whether one of the streams is the dense model's, beside another."""


@contextmanager
def passing(trial: Trial, load: Load, report: Progress) -> Iterator[WorkerPool]:
    """Start workers whose samples, each a partition of its own, stand before the first block.

    Raises:
        InputError: when the hidden states fit no budget.
        RunError: a worker failed.
    """
    request, resources, windows = trial.request, trial.resources, trial.windows
    model = request.model
    useful = resolve_workers(resources.workers, model.device, request.recipe.threads, len(windows.tokens))
    check_gpus(useful, model.device, resources.address)
    counts = range(useful, 0, -1) if resources.workers == "auto" else [useful]
    way = arranged_for(trial, load, counts)
    workers = Workers(way.workers, request.recipe.threads, resources.address, way.workers, resources.dashboard)
    with ExitStack() as stack:
        stack.enter_context(ray_for(workers, model.device, report))
        places = reserve_places(workers, model.device, workers.count, PATIENCE_SECONDS)
        if places.size != way.workers:
            way = arranged_for(trial, load, [places.size])
        setup = model.worker_setup(workers.threads, way.activations, str(trial.scratch), dense_stream=load.dense_stream)
        expected = library_versions() | machine_facts(model.device)
        pool = stack.enter_context(start_pool(setup, places, expected=expected))
        pool.start(model.layout.stem, deal_samples(windows, 1, pool.size))
        yield pool


def arranged_for(trial: Trial, load: Load, workers: Sequence[int]) -> Arrangement:
    """Choose where hidden states are kept: those of all streams are samples of a run that prunes nothing.

    Raises:
        InputError: where they fit no budget.
    """
    request, resources, windows = trial.request, trial.resources, len(trial.windows.tokens)
    method, model = METHODS["magnitude"], request.model
    recipe = request.recipe.model_copy(
        update={
            **{"method": method.name, "methods": {}, "correction": 0.0, "reconstruct": 0, "fit": method.fit},
            **{"samples": load.streams * windows, "partition_samples": load.streams},
        }
    )
    seqlen = recipe.seqlen or 0
    job = Job(recipe, method, method.options(), request.pattern, load.streams * windows, resources.address is None)
    work = block_work(model, request.linears, seqlen)
    head = reduce(larger, (load.beside(facts, recipe) for facts in work), Need(logits_bytes(model, seqlen), 0, 0))
    budgets = resolve_budgets(resources.vram, resources.ram, resources.disk, model.device, None, resources.scratch)
    here = resolve_workers("auto", model.device, recipe.threads, windows)
    free = max(0, free_disk_bytes(trial.scratch) - DISK_RESERVE_BYTES)
    try:
        return arrange(
            job,
            [replace(facts, linears=()) for facts in work],
            replace(budgets, scratch_disk=min(free, free if budgets.scratch_disk is None else budgets.scratch_disk)),
            measured_rates(model),
            workers,
            own_bytes(os.getpid()) + load.held_bytes,
            {"activations": resources.activations, "intermediates": "auto", "statistics": "auto"},
            0,
            head,
            None if resources.address is None else here,
        )
    except DoesNotFitError as error:
        raise BudgetError(
            f"--allocation {request.recipe.allocation}: {load.told} (--set-allocation samples=N for fewer). {error}"
        ) from error
