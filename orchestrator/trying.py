"""Several ways to change a model, tried together on the calibration samples: one pass, whatever number of them."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from billhook.cluster.memory import own_bytes
from billhook.layerworkers.candidates import Branch, BranchTask, Deviation
from billhook.layerworkers.errors import BudgetError
from billhook.layerworkers.machine import library_versions, machine_facts
from billhook.layerworkers.methods import METHODS
from billhook.orchestrator.allocation import Candidate
from billhook.orchestrator.budgets import DISK_RESERVE_BYTES, free_disk_bytes, resolve_budgets
from billhook.orchestrator.calibration import Windows, deal_samples
from billhook.orchestrator.evaluation import logits_bytes
from billhook.orchestrator.events import Progress, Step
from billhook.orchestrator.job import Job
from billhook.orchestrator.layout import Block, Linear
from billhook.orchestrator.model import check_gpus, resolve_workers
from billhook.orchestrator.phases import Need, changing, larger
from billhook.orchestrator.placing import Arrangement, DoesNotFitError, arrange
from billhook.orchestrator.planning import block_work
from billhook.orchestrator.probe import measured_rates
from billhook.orchestrator.recipe import Resources
from billhook.orchestrator.request import Request
from billhook.orchestrator.workers import PATIENCE_SECONDS, Workers, ray_for, reserve_places, start_pool

if TYPE_CHECKING:
    from billhook.cluster.pool import WorkerPool


class Brancher(Protocol):
    """A worker, or all of them: see :meth:`billhook.cluster.pool.WorkerPool.branch_block`."""

    def branch_block(self, task: BranchTask) -> list[Deviation]:
        """Carry streams through a block and split them."""


@dataclass(frozen=True)
class Trial:
    """What candidates are tried on."""

    request: Request
    resources: Resources
    windows: Windows
    """The samples that pass them."""
    scratch: Path
    """Folder for what memory has no room for."""


@dataclass(frozen=True)
class Passed:
    """How candidates left a block."""

    deviations: Sequence[Deviation]
    """By stream."""
    stream_of: Sequence[int]
    """By candidate, the stream that it is from there on: those that are alike are one."""


def deviations_of(trial: Trial, candidates: Sequence[Candidate], report: Progress) -> list[list[Deviation]]:
    """Return how far each block of each candidate is from the dense block on the same input.

    Raises:
        InputError: when the hidden states of all candidates fit no budget.
        RunError: a worker failed.
    """
    found: list[list[Deviation]] = [[] for _ in candidates]
    with _passing(trial, candidates, report, _shrinkage_bytes(trial.request, candidates)) as (_, blocks):
        for block in blocks:
            for own, stream in zip(found, block.stream_of, strict=True):
                own.append(block.deviations[stream])
    return found


def losses_of(trial: Trial, candidates: Sequence[Candidate], report: Progress) -> list[float]:
    """Return the mean cross-entropy of each candidate, in nats per token.

    Raises:
        InputError, RunError: as :func:`deviations_of`.
    """
    stream_of: Sequence[int] = ()
    with _passing(trial, candidates, report) as (pool, blocks):
        for block in blocks:
            stream_of = block.stream_of
        losses = [math.fsum(each.nats for each in own) / len(own) for own in pool.candidate_losses()]
    return [losses[stream] for stream in stream_of]


def _shrinkage_bytes(request: Request, candidates: Sequence[Candidate]) -> int:
    """Return what the deviations of all candidates take at most."""
    channels = 0
    for block, linears in enumerate(request.linears):
        inputs = {linear.group: linear.shape[1] for linear in linears}
        channels += sum(inputs.values()) * sum(each.get(block) is not None for each in candidates)
    return 4 * channels


@contextmanager
def _passing(
    trial: Trial, candidates: Sequence[Candidate], report: Progress, held_bytes: int = 0
) -> Iterator[tuple[WorkerPool, Iterator[Passed]]]:
    """Pass the samples through all candidates, as the blocks are asked for; held_bytes: see :func:`arranged_for`."""
    request, resources, windows = trial.request, trial.resources, trial.windows
    model, blocks, count = request.model, request.model.layout.blocks, len(windows.tokens)
    streams = most_streams(candidates, len(blocks))
    useful = resolve_workers(resources.workers, model.device, request.recipe.threads, count)
    check_gpus(useful, model.device, resources.address)
    counts = range(useful, 0, -1) if resources.workers == "auto" else [useful]
    way = arranged_for(trial, streams, counts, held_bytes)
    workers = Workers(way.workers, request.recipe.threads, resources.address, way.workers, resources.dashboard)
    with ExitStack() as stack:
        stack.enter_context(ray_for(workers, model.device, report))
        places = reserve_places(workers, model.device, workers.count, PATIENCE_SECONDS)
        if places.size != way.workers:
            way = arranged_for(trial, streams, [places.size], held_bytes)
        setup = model.worker_setup(workers.threads, way.activations, str(trial.scratch))
        expected = library_versions() | machine_facts(model.device)
        pool = stack.enter_context(start_pool(setup, places, expected=expected))
        pool.start(model.layout.stem, deal_samples(windows, 1, pool.size))
        yield pool, carried(pool, blocks, request.linears, candidates, count, report)


def carried(
    pool: Brancher,
    blocks: Sequence[Block],
    linears: Sequence[Sequence[Linear]],
    candidates: Sequence[Candidate],
    samples: int,
    report: Progress,
) -> Iterator[Passed]:
    """Carry candidates through all blocks, one after the other; each block is loaded once."""
    stream_of = [0] * len(candidates)
    for block in blocks:
        branches, stream_of = split(candidates, block.index, stream_of)
        task = BranchTask(
            block.index,
            block.tensors,
            tuple((linear.name, linear.disk_name) for linear in linears[block.index]),
            tuple(branches),
            samples,
            tuple(tensor for later in blocks[block.index + 1 : block.index + 2] for tensor in later.tensors),
        )
        yield Passed(pool.branch_block(task), stream_of)
        report(Step("allocate", block.index + 1, len(blocks), f"{len(branches)} streams"))


def split(candidates: Sequence[Candidate], block: int, stream_of: Sequence[int]) -> tuple[list[Branch], list[int]]:
    """Return the streams beyond a block, and which of them each candidate is; stream_of: which it was before."""
    wanted = [Branch(stream, each.get(block)) for stream, each in zip(stream_of, candidates, strict=True)]
    branches = sorted(dict.fromkeys(wanted), key=lambda branch: branch.parent)
    numbers: Mapping[Branch, int] = {branch: number for number, branch in enumerate(branches)}
    return branches, [numbers[branch] for branch in wanted]


def most_streams(candidates: Sequence[Candidate], blocks: int) -> int:
    """Return the most streams that there are at once."""
    stream_of, most = [0] * len(candidates), 1
    for block in range(blocks):
        branches, stream_of = split(candidates, block, stream_of)
        most = max(most, len(branches))
    return most


def arranged_for(trial: Trial, streams: int, workers: Sequence[int], held_bytes: int = 0) -> Arrangement:
    """Choose where hidden states are kept: those of all streams are samples of a run that prunes nothing.

    held_bytes: what this process will hold of what is found.

    Raises:
        InputError: where they fit no budget.
    """
    request, resources, windows = trial.request, trial.resources, len(trial.windows.tokens)
    method, model = METHODS["magnitude"], request.model
    recipe = request.recipe.model_copy(
        update={
            **{"method": method.name, "methods": {}, "correction": 0.0, "reconstruct": 0, "fit": method.fit},
            **{"samples": streams * windows, "partition_samples": streams},
        }
    )
    seqlen = recipe.seqlen or 0
    job = Job(recipe, method, method.options(), request.pattern, streams * windows, resources.address is None)
    work = block_work(model, request.linears, seqlen)
    head = reduce(larger, (changing(facts, recipe) for facts in work), Need(logits_bytes(model, seqlen), 0, 0))
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
            own_bytes(os.getpid()) + held_bytes,
            {"activations": resources.activations, "intermediates": "auto", "statistics": "auto"},
            0,
            head,
            None if resources.address is None else here,
        )
    except DoesNotFitError as error:
        raise BudgetError(
            f"--allocation {request.recipe.allocation}: carries up to {streams} candidates at once, each with the "
            f"hidden states of {windows} samples (--set-allocation samples=N for fewer). {error}"
        ) from error
