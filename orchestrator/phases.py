"""What every phase of a block takes in memory.

Every size here is bytes. "Device" is the memory that computes: a GPU's, or on a CPU that part of RAM which would be on
the GPU if there were one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from billhook.kernels.gram import BAND_ROWS
from billhook.kernels.products import row_partitions
from billhook.layerworkers.methods import Method
from billhook.layerworkers.patterns import Pattern
from billhook.layerworkers.reduction import even_ranges, node_count
from billhook.layerworkers.scratch import BAND_BYTES
from billhook.layerworkers.shards import DTYPES, FLOAT_DTYPES
from billhook.layerworkers.sharing import FAR_EXCHANGE_SECONDS, NEAR_EXCHANGE_SECONDS, is_local, share_out, work_of
from billhook.layerworkers.skeleton import Footprint
from billhook.layerworkers.tasks import Placement
from billhook.orchestrator.layout import Block, Linear
from billhook.orchestrator.recipe import Recipe

RAY_BYTES = 495 << 20
"""Memory of Ray's own processes on one node, its agents included, and of the actor that counts workers."""

LIBRARY_BYTES = 200 << 20
"""Pages of libraries that the processes of a run share, counted once."""

DRIVER_BYTES = 20 << 20
"""What the driver needs of its own beyond what it has when it plans: its connection to Ray."""

WORKER_BYTES = 65 << 20
"""The same of a worker, with compiled loops and the work space of BLAS."""

HELD_SLACK = 1.15
"""Memory that many small pieces take for each byte in them."""

STORE_BANDS = 3
"""Bands of each worker that Ray's object store has room for."""

MIN_STORE_BYTES = 80 << 20
"""Smallest object store that Ray starts with."""


@dataclass(frozen=True)
class Need:
    """Bytes in use at some moment."""

    device: int
    ram: int
    """Beside the device's."""
    disk: int
    """In scratch files."""

    def __add__(self, other: Need) -> Need:
        return Need(self.device + other.device, self.ram + other.ram, self.disk + other.disk)


@dataclass(frozen=True)
class Job:
    """What is done to the blocks, as far as it decides memory and time."""

    recipe: Recipe
    method: Method
    options: Any
    pattern: Pattern
    samples: int
    """0 for methods that need none."""
    near: bool = False
    """Whether all workers are on one machine."""

    @property
    def exchange_seconds(self) -> float:
        """Of an exchange between workers."""
        return NEAR_EXCHANGE_SECONDS if self.near else FAR_EXCHANGE_SECONDS

    @property
    def partitions(self) -> int:
        """Partitions of the samples."""
        return -(-self.samples // self.recipe.partition_samples)


@dataclass(frozen=True)
class BlockWork:
    """One block, as far as it decides memory and time."""

    block: Block
    linears: tuple[Linear, ...]
    """Those to prune."""
    footprint: Footprint
    next_bytes: int
    """Of the next block's tensors on disk."""

    def kind(self, recipe: Recipe) -> object:
        """Return what two blocks have in common that need the same."""
        footprint = self.footprint
        waiting = tuple(sorted(footprint.waiting_bytes.items()))
        linears = tuple((linear.group, linear.shape, linear.item_bytes) for linear in self.linears)
        sizes = (footprint.hidden_bytes, footprint.running_bytes, waiting, self.next_bytes)
        return (*sizes, linears, _weights(self.block, recipe))

    @property
    def groups(self) -> dict[int, list[Linear]]:
        """The linears to prune by their input."""
        groups: dict[int, list[Linear]] = {}
        for linear in self.linears:
            groups.setdefault(linear.group, []).append(linear)
        return groups

    def waiting(self, group: int) -> int:
        """Return what one sample holds before ``group``."""
        first = next(linear.name for linear in self.linears if linear.group == group)
        return self.footprint.waiting_bytes[first]


def processes_bytes(workers: int, own: int) -> int:
    """Return the memory of all processes of a run before any data.

    own: what a process has that has imported the same libraries, such as this one.
    """
    return RAY_BYTES + LIBRARY_BYTES + DRIVER_BYTES + own + workers * (own + WORKER_BYTES)


def store_bytes(workers: int) -> int:
    """Return the size of Ray's object store: what workers send each other is in it, or as much is elsewhere."""
    return 0 if workers == 1 else max(MIN_STORE_BYTES, STORE_BANDS * workers * BAND_BYTES)


def block_phases(
    job: Job, facts: BlockWork, placement: Placement, workers: int, activations: str
) -> Iterator[tuple[str, list[Need]]]:
    """Yield each phase of a block with what every worker needs in it."""
    recipe = job.recipe
    statistic = job.method.statistic
    ranges = even_ranges(job.partitions, workers)
    own_samples = [
        max(0, min(stop * recipe.partition_samples, job.samples) - start * recipe.partition_samples)
        for start, stop in ranges
    ]
    hidden, running = facts.footprint.hidden_bytes, facts.footprint.running_bytes
    weights = _weights(facts.block, recipe)
    ahead = Need(0, facts.next_bytes if placement.read_ahead else 0, 0)
    resident = [at_tier(activations, hidden * samples) + weights for samples in own_samples]
    # What is held of a sample that waits is counted without its input where that is kept on the device anyway.
    counted = hidden if activations == "device" else 0

    def held(rank: int, group: int | None) -> Need:
        if group is None or recipe.fit == "dense-block":
            return Need(0, 0, 0)
        size = own_samples[rank] * max(0, facts.waiting(group) - counted)
        if placement.intermediates == "hold":
            return Need(int(HELD_SLACK * size), 0, 0)
        return at_tier(placement.spill_to, size) if placement.intermediates == "spill" else Need(0, 0, 0)

    def sums(rank: int, columns: int) -> Need:
        """Partial sums while samples arrive: the one that grows, and those that wait for their siblings."""
        if statistic is None or not own_samples[rank]:
            return Need(0, 0, 0)
        size = statistic.size_bytes(columns)
        start, stop = ranges[rank]
        waiting = max(node_count(start, end) for end in range(start, stop))
        return Need(size, 0, 0) + at_tier(placement.statistics, waiting * size)

    yield "read", [weights + ahead + Need(0, BAND_BYTES, 0)] * workers
    groups = facts.groups
    previous: int | None = None
    columns_of = {group: linears[0].shape[1] for group, linears in groups.items()}
    cast = 8 * (recipe.seqlen or 0) + (4 * BAND_ROWS if recipe.device != "cpu" else 0) if statistic is not None else 0
    if recipe.fit == "dense-block" and statistic is not None:
        yield (
            "statistics",
            [
                resident[rank]
                + ahead
                + _dense_sums(placement, [sums(rank, columns) for columns in columns_of.values()])
                + Need(running + cast * max(columns_of.values(), default=0), 0, 0)
                for rank in range(workers)
            ],
        )
    for group, linears in groups.items():
        columns = columns_of[group]
        if recipe.fit == "lockstep" and statistic is not None:
            yield (
                f"statistics of {linears[0].name}",
                [
                    resident[rank]
                    + ahead
                    + larger(held(rank, previous), held(rank, group))
                    + sums(rank, columns)
                    + Need(max(running, cast * columns + facts.waiting(group)), 0, 0)
                    for rank in range(workers)
                ],
            )
        solving = _solving(job, linears, ranges, placement)
        later = Need(0, 0, 0)
        if recipe.fit == "dense-block" and statistic is not None:
            sizes = [statistic.size_bytes(columns_of[each]) for each in groups if each > group]
            later = at_tier(placement.statistics if placement.intermediates == "replay" else "device", sum(sizes))
        yield (
            f"solving {linears[0].name}",
            [resident[rank] + ahead + held(rank, group) + solving[rank] + later for rank in range(workers)],
        )
        previous = group
    yield (
        "outputs",
        [
            resident[rank] + ahead + held(rank, previous) + Need(running if own_samples[rank] else 0, 0, 0)
            for rank in range(workers)
        ],
    )


def _dense_sums(placement: Placement, sums: Sequence[Need]) -> Need:
    if placement.intermediates != "replay":
        return sum_of(sums)
    largest = max(sums, key=lambda need: need.device, default=Need(0, 0, 0))
    return largest + at_tier(placement.statistics, sum(need.device for need in sums) - largest.device)


def _solving(
    job: Job, linears: Sequence[Linear], partitions: Sequence[tuple[int, int]], placement: Placement
) -> list[Need]:
    """Return what each worker needs to solve the linears of one group, beside block and activations.

    partitions: each worker's range of them.
    """
    recipe, method, workers = job.recipe, job.method, len(partitions)
    columns = linears[0].shape[1]
    local = is_local(method, job.pattern)
    work = [work_of(method, job.pattern, job.options, *linear.shape) for linear in linears]
    partition_rows = recipe.partition_rows or 256
    ranges = share_out(work, workers, partition_rows, job.exchange_seconds)
    statistic = method.statistic.size_bytes(columns) if method.statistic is not None else 0
    needs = []
    for rank in range(workers):
        rows = [own[rank][1] - own[rank][0] for own in ranges]
        at_once = max(rows)
        if local and at_once:
            at_once = max(stop - start for start, stop in row_partitions(at_once, partition_rows))
        partials = node_count(*partitions[rank]) if placement.statistics == "device" else 0
        held = max(partials * statistic, statistic if max(rows) else 0)
        if recipe.device != "cpu" and max(rows):
            held += 3 * statistic  # torch factorises into copies
        if workers > 1 and statistic:
            held += (workers + 1) * BAND_BYTES
        solution = sum(own * columns * linear.item_bytes for own, linear in zip(rows, linears, strict=True))  # in RAM
        if job.near:
            solution += _messages_bytes(linears, workers)
        working = 4 * at_once * columns + method.extra_bytes(at_once, columns) if at_once else 0
        needs.append(Need(held + working, solution, 0))
    return needs


def _messages_bytes(linears: Sequence[Linear], workers: int) -> int:
    """Return what workers of one machine hold of each other's rows, beyond what is planned for Ray's store.

    Between them nothing goes through that. Of each other worker a message is there, and the next may be.
    """
    share = sum(linear.shape[0] * linear.shape[1] * linear.item_bytes for linear in linears) // workers
    return max(0, 2 * (workers - 1) * min(BAND_BYTES, share) - STORE_BANDS * BAND_BYTES)


def _weights(block: Block, recipe: Recipe) -> Need:
    """Return a block's tensors: as on disk, and in the compute dtype on the device where that is a copy."""
    compute = getattr(torch, recipe.dtype)
    on_disk = sum(tensor.entry.size_bytes for tensor in block.tensors)
    on_device, shared = 0, 0
    for tensor in block.tensors:
        dtype = DTYPES.get(tensor.entry.dtype)
        if recipe.device == "cpu" and (tensor.entry.dtype not in FLOAT_DTYPES or dtype == compute):
            shared += tensor.entry.size_bytes
        elif dtype is not None:
            on_device += tensor.entry.size_bytes // dtype.itemsize * compute.itemsize
    return Need(on_device + shared, on_disk - shared, 0)


def at_tier(tier: str, size: int) -> Need:
    """Return a need of ``size`` bytes on ``device``, ``ram`` or ``disk``."""
    return Need(size if tier == "device" else 0, size if tier == "ram" else 0, size if tier == "disk" else 0)


def sum_of(needs: Sequence[Need]) -> Need:
    """Return the needs together."""
    return Need(sum(n.device for n in needs), sum(n.ram for n in needs), sum(n.disk for n in needs))


def larger(one: Need, other: Need) -> Need:
    """Return the larger of each."""
    return Need(max(one.device, other.device), max(one.ram, other.ram), max(one.disk, other.disk))
