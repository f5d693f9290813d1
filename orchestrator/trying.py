"""Several ways to change a model, tried together on the calibration samples: one pass, whatever number of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from billhook.layerworkers.candidates import Branch, BranchTask, Deviation
from billhook.orchestrator.allocation import Candidate
from billhook.orchestrator.events import Progress, Step
from billhook.orchestrator.layout import Block, Linear
from billhook.orchestrator.passing import Load, Trial, passing
from billhook.orchestrator.phases import changing
from billhook.orchestrator.request import Request

if TYPE_CHECKING:
    from billhook.cluster.pool import WorkerPool


class Brancher(Protocol):
    """A worker, or all of them: see :meth:`billhook.cluster.pool.WorkerPool.branch_block`."""

    def branch_block(self, task: BranchTask) -> list[Deviation]:
        """Carry streams through a block and split them."""


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
    """Pass the samples through all candidates, as the blocks are asked for; held_bytes: see :class:`Load`."""
    blocks, count = trial.request.model.layout.blocks, len(trial.windows.tokens)
    with passing(trial, load_of(candidates, len(blocks), count, held_bytes), report) as pool:
        yield pool, carried(pool, blocks, trial.request.linears, candidates, count, report)


def load_of(candidates: Sequence[Candidate], blocks: int, samples: int, held_bytes: int) -> Load:
    """Return what candidates take while so many samples pass them."""
    streams = most_streams(candidates, blocks)
    told = f"carries up to {streams} candidates at once, each with the hidden states of {samples} samples"
    return Load(streams, changing, told, held_bytes=held_bytes)


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
