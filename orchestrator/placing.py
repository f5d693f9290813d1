"""Where a run keeps what: the memory of every phase of a block, and the fastest way of working that the budgets allow.

Every size here is bytes. "Device" is the memory that computes: a GPU's, or on a CPU that part of RAM which would be on
the GPU if there were one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from billhook.kernels.products import row_partitions
from billhook.layerworkers.errors import InputError
from billhook.layerworkers.methods import Method
from billhook.layerworkers.patterns import NM, Pattern
from billhook.layerworkers.reduction import even_ranges
from billhook.layerworkers.scratch import BAND_BYTES
from billhook.layerworkers.shards import DTYPES, FLOAT_DTYPES
from billhook.layerworkers.sharing import Work, share_out
from billhook.layerworkers.skeleton import Footprint
from billhook.layerworkers.tasks import Placement
from billhook.orchestrator.budgets import Budgets
from billhook.orchestrator.layout import Block, Linear
from billhook.orchestrator.probe import Rates
from billhook.orchestrator.recipe import Recipe

RAY_BYTES = 390 << 20
"""Memory of Ray's own processes on one node, and of the mailbox."""

LIBRARY_BYTES = 200 << 20
"""Pages of libraries that the processes of a run share, counted once."""

DRIVER_BYTES = 20 << 20
"""What the driver needs of its own beyond what it has when it plans: its connection to Ray."""

WORKER_BYTES = 65 << 20
"""The same of a worker, with compiled loops and the work space of BLAS."""

HELD_SLACK = 1.15
"""Memory that many small pieces take for each byte in them."""

MIN_STORE_BYTES = 80 << 20
"""Smallest object store that Ray starts with."""


RAM_TRUST = 0.97
"""Share of the RAM budget that is planned with: what processes take is not known to the last page."""


class DoesNotFitError(InputError):
    """No way of working fits the budgets."""

    def __init__(self, reason: str, smallest: Budgets):
        super().__init__(reason)
        self.smallest = smallest
        """The budgets, with the one that is exceeded raised to what works."""


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


@dataclass(frozen=True)
class Arrangement:
    """A way of working for the whole run."""

    workers: int
    on_gpu: bool
    activations: str
    """``device``, ``ram`` or ``disk``."""
    placements: tuple[Placement, ...]
    """By block."""
    phases: Mapping[str, Need]
    """By phase, at the worst block."""
    peak: Need
    """Device: of one worker (on a CPU a part of RAM); the others: of the node, processes included."""
    extra_seconds: float
    """What it takes longer than if all memory were there."""


def processes_bytes(workers: int, own: int) -> int:
    """Return the memory of all processes of a run before any data.

    own: what a process has that has imported the same libraries, such as this one.
    """
    return RAY_BYTES + LIBRARY_BYTES + DRIVER_BYTES + own + workers * (own + WORKER_BYTES)


def store_bytes(workers: int) -> int:
    """Return the size of Ray's object store, all of which is in use sooner or later where there are several workers."""
    return 0 if workers == 1 else max(MIN_STORE_BYTES, 3 * workers * BAND_BYTES)


def arrange(
    job: Job,
    blocks: Sequence[BlockWork],
    budgets: Budgets,
    rates: Rates,
    worker_counts: Sequence[int],
    own_bytes: int,
    wanted: Mapping[str, str],
    output_bytes: int,
    head: Need | None = None,
) -> Arrangement:
    """Return the fastest way of working that the budgets allow.

    worker_counts: those allowed, the best first. wanted: tiers that the user fixed, by option. head: what each worker
    needs after the blocks, beside its activations.

    Raises:
        DoesNotFitError: when none is: the smallest budget that would do is named.
    """
    smallest: dict[str, int] = {}
    within = replace(budgets, disk=None if budgets.disk is None else budgets.disk - output_bytes)
    for workers in worker_counts:
        best: Arrangement | None = None
        for activations in _tiers(wanted["activations"], job):
            made = _arrange_with(job, blocks, within, rates, workers, activations, own_bytes, wanted, smallest, head)
            if made is not None and (best is None or made.extra_seconds < best.extra_seconds):
                best = made
        if best is not None:
            return best
    raise _misfit(budgets, smallest, output_bytes, job)


def _misfit(budgets: Budgets, smallest: Mapping[str, int], output_bytes: int, job: Job) -> DoesNotFitError:
    if "ram" not in smallest and "disk" in smallest:
        disk = smallest["disk"] + output_bytes
        return DoesNotFitError(
            f"--disk {_gib(budgets.disk or 0)}: output and scratch need --disk {_gib(disk)}; free some space, choose "
            "another -o, or raise --disk",
            replace(budgets, disk=disk),
        )
    # What fails for RAM alone fits the device: so RAM it is, where both fail.
    option = "ram" if "ram" in smallest else "vram"
    # Rounded up: the size of our own processes differs a little from one command to the next.
    margin = 1.01 / RAM_TRUST if option == "ram" else 1.01
    enough = -(-int(margin * smallest[option]) // 2**26) * 2**26
    budget = budgets.ram if option == "ram" else budgets.vram or 0
    return DoesNotFitError(
        f"--{option} {_gib(budget)}: too small for the largest phase of the largest block, whatever else is kept on "
        f"disk; the smallest budget that works is --{option} {enough / 2**30:.4g}GiB (method {job.method.name}, "
        f"{job.samples} samples of {job.recipe.seqlen} tokens, dtype {job.recipe.dtype})",
        replace(budgets, ram=enough) if option == "ram" else replace(budgets, vram=enough),
    )


def _arrange_with(
    job: Job,
    blocks: Sequence[BlockWork],
    budgets: Budgets,
    rates: Rates,
    workers: int,
    activations: str,
    own_bytes: int,
    wanted: Mapping[str, str],
    smallest: dict[str, int],
    head: Need | None,
) -> Arrangement | None:
    """Choose each block's placement, given where the activations are; None where a block has none that fits."""
    fixed = processes_bytes(workers, own_bytes) + store_bytes(workers)
    chosen: dict[object, tuple[Placement, dict[str, list[Need]], float]] = {}
    placements: list[Placement] = []
    phases: dict[str, Need] = {}
    peak, extra = Need(0, 0, 0), 0.0
    short: dict[str, int] = {}
    on_cpu = job.recipe.device == "cpu"
    for facts in blocks:
        kind = facts.kind(job.recipe)
        if kind not in chosen:
            options = []
            misses: dict[str, int] = {}
            for placement in _placements(job, wanted):
                by_phase = dict(_phases(job, facts, placement, workers, activations))
                if head is not None:
                    hidden = facts.footprint.hidden_bytes * -(-job.samples // workers)
                    by_phase["head"] = [_at(activations, hidden) + head] * workers
                exceeded = _exceeded(_node(by_phase, fixed, on_cpu), budgets)
                for option, size in exceeded.items():
                    misses[option] = min(misses.get(option, size), size)
                if not exceeded:
                    options.append((placement, by_phase, _extra_seconds(job, facts, placement, workers, rates)))
            if not options:
                for option, size in misses.items():
                    short[option] = max(short.get(option, 0), size)
                continue
            chosen[kind] = min(options, key=lambda option: option[2])
        placement, by_phase, seconds = chosen[kind]
        placements.append(placement)
        extra += seconds
        for name, own in by_phase.items():
            total = _node({name: own}, fixed, on_cpu)
            phases[name] = _larger(phases.get(name, total), total)
        peak = _larger(peak, _node(by_phase, fixed, on_cpu))
    if short:
        for option, size in short.items():
            smallest[option] = min(smallest.get(option, size), size)
        return None
    if activations != "device" and job.samples:
        hidden = blocks[0].footprint.hidden_bytes * job.samples
        extra += 2 * len(blocks) * hidden / (rates.disk_bytes if activations == "disk" else rates.copy_bytes)
    return Arrangement(workers, not on_cpu, activations, tuple(placements), phases, peak, extra)


def _exceeded(need: Need, budgets: Budgets) -> dict[str, int]:
    """Return the budget that does not suffice, and what would: the device's before RAM's before the disk's."""
    if budgets.vram is not None and need.device > budgets.vram:
        return {"vram": need.device}
    if need.ram > RAM_TRUST * budgets.ram:
        return {"ram": need.ram}
    if budgets.disk is not None and need.disk > budgets.disk:
        return {"disk": need.disk}
    return {}


def _node(by_phase: Mapping[str, Sequence[Need]], fixed_bytes: int, on_cpu: bool) -> Need:
    """Return the device's worst phase on one worker, and the worst of RAM and disk over all workers of the node."""
    totals = [_sum(own) for own in by_phase.values()]
    return Need(
        max(each.device for own in by_phase.values() for each in own),
        fixed_bytes + max(total.ram + (total.device if on_cpu else 0) for total in totals),
        max(total.disk for total in totals),
    )


def _tiers(wanted: str, job: Job) -> list[str]:
    if wanted != "auto":
        return [wanted]
    return ["device", "ram", "disk"]


def _placements(job: Job, wanted: Mapping[str, str]) -> Iterator[Placement]:
    dense = job.recipe.fit == "dense-block" or not job.samples
    intermediates = ["hold", "replay"] if dense else ["hold", "spill", "replay"]
    if wanted["intermediates"] != "auto":
        # The dense block is run without a pause: nothing waits that could be spilled.
        intermediates = ["hold" if dense and wanted["intermediates"] == "spill" else wanted["intermediates"]]
    statistics = ["device", "ram", "disk"] if wanted["statistics"] == "auto" else [wanted["statistics"]]
    for read_ahead, keep, tier in itertools.product([True, False], intermediates, statistics):
        for spill_to in ["ram", "disk"] if keep == "spill" else ["disk"]:
            yield Placement(keep, spill_to, tier, read_ahead)


def _phases(
    job: Job, facts: BlockWork, placement: Placement, workers: int, activations: str
) -> Iterator[tuple[str, list[Need]]]:
    """Yield each phase of a block with what every worker needs in it."""
    recipe = job.recipe
    statistic = job.method.statistic
    ranges = even_ranges(job.partitions, workers)
    own_partitions = [stop - start for start, stop in ranges]
    own_samples = [
        max(0, min(stop * recipe.partition_samples, job.samples) - start * recipe.partition_samples)
        for start, stop in ranges
    ]
    hidden, running = facts.footprint.hidden_bytes, facts.footprint.running_bytes
    weights = _weights(facts.block, recipe)
    ahead = Need(0, facts.next_bytes if placement.read_ahead else 0, 0)
    resident = [_at(activations, hidden * samples) + weights for samples in own_samples]
    # What is held of a sample that waits is counted without its input where that is kept on the device anyway.
    counted = hidden if activations == "device" else 0

    def held(rank: int, group: int | None) -> Need:
        if group is None or recipe.fit == "dense-block":
            return Need(0, 0, 0)
        size = own_samples[rank] * max(0, facts.waiting(group) - counted)
        if placement.intermediates == "hold":
            return Need(int(HELD_SLACK * size), 0, 0)
        return _at(placement.spill_to, size) if placement.intermediates == "spill" else Need(0, 0, 0)

    def sums(rank: int, columns: int) -> Need:
        """Partial sums while samples arrive: the one that grows, and those that wait for their siblings."""
        if statistic is None or not own_partitions[rank]:
            return Need(0, 0, 0)
        size = statistic.size_bytes(columns)
        waiting = max(number.bit_count() for number in range(own_partitions[rank]))
        return Need(size, 0, 0) + _at(placement.statistics, waiting * size)

    yield "read", [weights + ahead + Need(0, BAND_BYTES, 0)] * workers
    groups = facts.groups
    previous: int | None = None
    columns_of = {group: linears[0].shape[1] for group, linears in groups.items()}
    cast = 8 * (recipe.seqlen or 0) if statistic is not None else 0
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
                    + _larger(held(rank, previous), held(rank, group))
                    + sums(rank, columns)
                    + Need(max(running, cast * columns + facts.waiting(group)), 0, 0)
                    for rank in range(workers)
                ],
            )
        solving = _solving(job, linears, workers, own_partitions, placement)
        later = Need(0, 0, 0)
        if recipe.fit == "dense-block" and statistic is not None:
            sizes = [statistic.size_bytes(columns_of[each]) for each in groups if each > group]
            later = _at(placement.statistics if placement.intermediates == "replay" else "device", sum(sizes))
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
        return _sum(sums)
    largest = max(sums, key=lambda need: need.device, default=Need(0, 0, 0))
    return largest + _at(placement.statistics, sum(need.device for need in sums) - largest.device)


def _solving(
    job: Job, linears: Sequence[Linear], workers: int, own_partitions: Sequence[int], placement: Placement
) -> list[Need]:
    """Return what each worker needs to solve the linears of one group, beside block and activations."""
    recipe, method = job.recipe, job.method
    columns = linears[0].shape[1]
    local = isinstance(job.pattern, NM) or method.within_rows
    work = [
        Work(
            linear.shape[0],
            method.flops(*linear.shape, job.options),
            0 if local else method.selections(columns, job.options),
        )
        for linear in linears
    ]
    partition_rows = recipe.partition_rows or 256
    ranges = share_out(work, workers, partition_rows)
    statistic = method.statistic.size_bytes(columns) if method.statistic is not None else 0
    needs = []
    for rank in range(workers):
        rows = [own[rank][1] - own[rank][0] for own in ranges]
        at_once = max(rows)
        if local and at_once:
            at_once = max(stop - start for start, stop in row_partitions(at_once, partition_rows))
        partials = own_partitions[rank].bit_count() if placement.statistics == "device" else 0
        held = max(partials * statistic, statistic if max(rows) else 0)
        if recipe.device != "cpu" and max(rows):
            held += 3 * statistic  # torch factorises into copies
        if workers > 1 and statistic:
            held += (workers + 1) * BAND_BYTES
        solution = sum(own * columns * linear.item_bytes for own, linear in zip(rows, linears, strict=True))  # in RAM
        working = 4 * at_once * columns + method.extra_bytes(at_once, columns) if at_once else 0
        needs.append(Need(held + working, solution, 0))
    return needs


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


def _extra_seconds(job: Job, facts: BlockWork, placement: Placement, workers: int, rates: Rates) -> float:
    """Return what a placement costs beyond holding everything on the device and overlapping all transfers."""
    seconds = 0.0
    samples = -(-job.samples // workers)
    parked = {"device": 0.0, "ram": 1 / rates.copy_bytes, "disk": 1 / rates.disk_bytes}
    if not placement.read_ahead:
        seconds += facts.next_bytes / rates.disk_bytes
    waiting = [facts.waiting(group) for group in facts.groups]
    if placement.intermediates == "spill" and job.samples:
        seconds += 2 * samples * sum(waiting) * parked[placement.spill_to]
    if placement.intermediates == "replay" and job.samples:
        forward = 2.0 * samples * (job.recipe.seqlen or 0) * sum(a.shape[0] * a.shape[1] for a in facts.block.linears)
        again = len(waiting) / 2 if job.recipe.fit == "lockstep" else max(0, len(waiting) - 1)
        seconds += again * forward / rates.flops
    if placement.statistics != "device" and job.method.statistic is not None:
        partitions = -(-job.partitions // workers)
        sizes = sum(job.method.statistic.size_bytes(linears[0].shape[1]) for linears in facts.groups.values())
        seconds += 2 * max(0, partitions - 1) * sizes * parked[placement.statistics]
    return seconds


def _at(tier: str, size: int) -> Need:
    return Need(size if tier == "device" else 0, size if tier == "ram" else 0, size if tier == "disk" else 0)


def _sum(needs: Sequence[Need]) -> Need:
    return Need(sum(n.device for n in needs), sum(n.ram for n in needs), sum(n.disk for n in needs))


def _larger(one: Need, other: Need) -> Need:
    return Need(max(one.device, other.device), max(one.ram, other.ram), max(one.disk, other.disk))


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f}GiB"
