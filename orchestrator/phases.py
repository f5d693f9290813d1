"""What every phase of a block takes in memory.

Every size here is bytes. "Device" is the memory that computes: a GPU's, or on a CPU that part of RAM which would be on
the GPU if there were one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from billhook.kernels.gram import BAND_ROWS
from billhook.kernels.products import row_partitions
from billhook.layerworkers.reconstruction import BATCH_PARTITIONS
from billhook.layerworkers.reduction import even_ranges, node_count
from billhook.layerworkers.scratch import BAND_BYTES
from billhook.layerworkers.shards import DTYPES, FLOAT_DTYPES
from billhook.layerworkers.sharing import is_local, share_out_stage
from billhook.layerworkers.tasks import Placement
from billhook.orchestrator.job import BlockWork, Job, Stage
from billhook.orchestrator.layout import Block, Linear
from billhook.orchestrator.needs import Need, at_tier, larger, sum_of
from billhook.orchestrator.recipe import Recipe
from billhook.orchestrator.turns import copies_bytes, turns_phases

RAY_BYTES = 495 << 20
"""Memory of Ray's own processes on one node, its agents included, and of the actor that counts workers."""

DASHBOARD_BYTES = 950 << 20
"""Memory that Ray's processes take more where they serve the dashboard."""

LIBRARY_BYTES = 300 << 20
"""Pages of libraries that the processes of a run share, counted once."""

DRIVER_BYTES = 20 << 20
"""What the driver needs of its own beyond what it has when it plans: its connection to Ray."""

WORKER_BYTES = 90 << 20
"""The same of a worker, with compiled loops and the work space of BLAS."""

HELD_SLACK = 1.15
"""Memory that many small pieces take for each byte in them."""

STORE_BANDS = 3
"""Bands of each worker that Ray's object store has room for."""

MIN_STORE_BYTES = 80 << 20
"""Smallest object store that Ray starts with."""


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
    """Yield each phase of a block with what every worker needs in it.

    Experts' come more than once, but only once of those that need the same.
    """
    recipe, summed = job.recipe, job.sums
    ranges = even_ranges(job.partitions, workers)
    own_samples = [
        max(0, min(stop * recipe.partition_samples, job.samples) - start * recipe.partition_samples)
        for start, stop in ranges
    ]
    hidden, running = facts.footprint.hidden_bytes, facts.footprint.running_bytes
    weights = _weights(facts.block, recipe)
    ahead = Need(0, facts.next_bytes if placement.read_ahead else 0, 0)
    # The dense block; weights and mean squared gradients, in float32, of what is tuned in rounds; dense weights.
    copied = Need(
        _compute_bytes(facts.block, recipe) if job.streams > 1 else 0,
        8 * sum(linear.shape[0] * linear.shape[1] for linear in job.in_rounds(facts)) + copies_bytes(job, facts),
        0,
    )
    resident = [at_tier(activations, job.copies * hidden * samples) + weights + copied for samples in own_samples]
    # What is held of a sample that waits is counted without its input where that is kept on the device anyway.
    counted = hidden if activations == "device" else 0

    def held(rank: int, stage: Stage | None) -> Need:
        if stage is None or recipe.fit == "dense-block":
            return Need(0, 0, 0)
        size = job.streams * own_samples[rank] * max(0, facts.waiting(stage) - counted)
        if placement.intermediates == "hold":
            return Need(int(HELD_SLACK * size), 0, 0)
        return at_tier(placement.spill_to, size) if placement.intermediates == "spill" else Need(0, 0, 0)

    most_waiting = [max((node_count(start, end) for end in range(start, stop)), default=0) for start, stop in ranges]

    def sums(rank: int, stage: Stage) -> Need:
        """Partial sums while samples arrive: those that grow, and those that wait for their siblings."""
        if not summed or not own_samples[rank]:
            return Need(0, 0, 0)
        size = sizes_bytes(job, facts, stage)
        return Need(size, 0, 0) + at_tier(placement.statistics, most_waiting[rank] * size)

    yield "read", [weights + ahead + Need(0, BAND_BYTES, 0)] * workers
    stages = facts.stages(placement.experts_at_once)
    previous: Stage | None = None
    widest = max((linears[0].shape[1] for stage in stages for linears in stage), default=0)
    cast = 8 * (recipe.seqlen or 0) + (4 * BAND_ROWS if recipe.device != "cpu" else 0) if summed else 0
    if recipe.fit == "dense-block" and summed:
        yield (
            "statistics",
            [
                resident[rank]
                + ahead
                + _dense_sums(placement, [sums(rank, stage) for stage in stages])
                + Need(running + cast * widest, 0, 0)
                for rank in range(workers)
            ],
        )
    seen: set[object] = set()
    for number, stage in enumerate(stages):
        # The first of its kind needs most: afterwards, fewer sums wait to be solved.
        kind = (facts.stage_kind(job, stage), previous and facts.stage_kind(job, previous))
        if kind in seen:
            previous = stage
            continue
        seen.add(kind)
        columns = max(linears[0].shape[1] for linears in stage)
        first = stage[0][0].kind
        if recipe.fit == "lockstep" and summed:
            ahead_of = 0
            if job.streams > 1:  # how the inputs deviate, in the compute dtype and in float32
                width = max(columns, *(linear.shape[0] for linears in stage for linear in linears[:1]))
                ahead_of = 8 * (recipe.seqlen or 0) * (columns + 2 * width)
            yield (
                f"statistics of {first}",
                [
                    resident[rank]
                    + ahead
                    + larger(held(rank, previous), held(rank, stage))
                    + sums(rank, stage)
                    + Need(max(running, cast * columns + facts.waiting(stage) + ahead_of), 0, 0)
                    for rank in range(workers)
                ],
            )
        solving = _solving(job, facts, stage, ranges, placement)
        later = Need(0, 0, 0)
        if recipe.fit == "dense-block" and summed:
            size = sum(sizes_bytes(job, facts, each) for each in stages[number + 1 :])
            later = at_tier(placement.statistics if placement.intermediates == "replay" else "device", size)
        yield (
            f"solving {first}",
            [resident[rank] + ahead + held(rank, stage) + solving[rank] + later for rank in range(workers)],
        )
        previous = stage
    yield from _going_back(job, facts, placement, activations, workers)
    for phase, needs in (
        *turns_phases(job, facts, placement, activations, ranges, most_waiting, own_samples),
        *_tuning_phases(job, facts, placement, most_waiting),
    ):
        yield phase, [resident[rank] + ahead + need for rank, need in enumerate(needs)]
    yield (
        "outputs",
        [
            resident[rank] + ahead + held(rank, previous) + Need(running if own_samples[rank] else 0, 0, 0)
            for rank in range(workers)
        ],
    )


def changing(facts: BlockWork, recipe: Recipe) -> Need:
    """Return what it takes to change a block's linears and to run it, beside hidden states between blocks.

    There are the dense weights and the changed ones, one of these in float32, the scores of some rows, and what a
    sample makes; the next block is read meanwhile.
    """
    item = getattr(torch, recipe.dtype).itemsize
    sizes = [linear.shape[0] * linear.shape[1] for linear in facts.linears]
    changed = item * sum(sizes) + 4 * max(sizes, default=0) + 5 * BAND_BYTES
    footprint = facts.footprint
    running = footprint.running_bytes + 2 * footprint.hidden_bytes
    return _weights(facts.block, recipe) + Need(changed + running, facts.next_bytes, 0)


def learning_by_gradients(facts: BlockWork, recipe: Recipe) -> Need:
    """Return what it takes to learn how sparse a block's linears should be, beside hidden states between blocks.

    There are the dense weights and masked ones, the order of their entries, their gradients, some rows in other dtypes,
    and what gradients of a sample need; the next block is read meanwhile.
    """
    item = getattr(torch, recipe.dtype).itemsize
    entries = sum(linear.shape[0] * linear.shape[1] for linear in facts.linears)
    footprint = facts.footprint
    running = footprint.backward_bytes + 2 * footprint.hidden_bytes
    learning = _compute_bytes(facts.block, recipe) + entries * (item + 4) + 8 * BAND_BYTES
    return _weights(facts.block, recipe) + Need(learning + running, facts.next_bytes, 0)


def sizes_bytes(job: Job, facts: BlockWork, stage: Stage) -> int:
    """Return the bytes of one total of each input of a stage."""
    sizes = ((job.statistic(facts, linears), linears[0].shape[1]) for linears in stage)
    return sum(statistic.size_bytes(columns) for statistic, columns in sizes if statistic is not None)


def _dense_sums(placement: Placement, sums: Sequence[Need]) -> Need:
    if placement.intermediates != "replay":
        return sum_of(sums)
    largest = max(sums, key=lambda need: need.device, default=Need(0, 0, 0))
    return largest + at_tier(placement.statistics, sum(need.device for need in sums) - largest.device)


def _solving(
    job: Job, facts: BlockWork, stage: Stage, partitions: Sequence[tuple[int, int]], placement: Placement
) -> list[Need]:
    """Return what each worker needs to solve the linears of one stage, beside block and activations.

    partitions: each worker's range of them.
    """
    recipe, workers = job.recipe, len(partitions)
    partition_rows = recipe.partition_rows or 256
    works = [[job.work(linear) for linear in linears] for linears in stage]
    shared = [job.shared(facts, linears) for linears in stage]
    ranges = share_out_stage(works, shared, workers, partition_rows, job.pace)
    needs = []
    for rank in range(workers):
        partials = node_count(*partitions[rank]) if placement.statistics == "device" else 0
        waiting, own, working, solution = 0, 0, 0, 0
        for linears, rows_of in zip(stage, ranges, strict=True):
            columns = linears[0].shape[1]
            statistic = sizes_bytes(job, facts, [linears])
            waiting += partials * statistic
            rows = [each[rank][1] - each[rank][0] for each in rows_of]
            if not max(rows):
                continue
            own += statistic
            summed = job.statistic(facts, linears)
            gram = 4 * columns**2 if summed is not None and summed.dimensions == 2 else 0
            copies = 3 * gram if recipe.device != "cpu" else 0  # torch factorises into copies
            methods = dict.fromkeys(job.solver(linear).method for linear in linears)
            others = gram * (len(methods) - 1)  # of which each makes a form of its own of the Gram
            if job.streams > 1:
                working = max(working, 2 * gram + copies)
            for linear, count in zip(linears, rows, strict=True):
                method = job.solver(linear).method
                at_once = count
                if is_local(method, job.pattern) and count:
                    at_once = max(stop - start for start, stop in row_partitions(count, partition_rows))
                dense = 4 * job.streams * at_once * columns  # and corrected
                working = max(working, dense + method.extra_bytes(at_once, columns) + copies + others)
            solution += sum(each * columns * linear.item_bytes for each, linear in zip(rows, linears, strict=True))
        held = max(waiting, own)
        if workers > 1 and job.sums:
            held += (workers + 1) * BAND_BYTES
        if job.near:
            solution += _messages_bytes([linear for linears in stage for linear in linears], workers)
        needs.append(Need(held + working, solution, 0))
    return needs


def _tuning_phases(
    job: Job, facts: BlockWork, placement: Placement, most_waiting: Sequence[int]
) -> Iterator[tuple[str, list[Need]]]:
    """Yield each phase in which gradients of a block are taken, with what every worker needs in it.

    most_waiting: by worker, the most partial sums of a total that wait for their siblings.
    """
    workers = len(most_waiting)
    in_rounds = job.in_rounds(facts)
    if in_rounds:
        squares = 4 * sum(linear.shape[0] * linear.shape[1] for linear in in_rounds)
        summing = _gradients(job, facts, in_rounds) + Need(squares, 0, 0)
        yield "gradients", [summing + at_tier(placement.statistics, waiting * squares) for waiting in most_waiting]
        yield "rounds", [_tuning(job, facts, in_rounds, rank, workers) for rank in range(workers)]
    if job.recipe.reconstruct:
        yield "reconstruction", [_tuning(job, facts, facts.linears, rank, workers) for rank in range(workers)]


def _going_back(
    job: Job, facts: BlockWork, placement: Placement, activations: str, workers: int
) -> Iterator[tuple[str, list[Need]]]:
    """Yield what each worker needs to take the gradients of the model's loss, before anything is pruned.

    There are what entered each block, what left the last one, and its gradient; the block, its gradients and their sums
    or the logits; the block before is read meanwhile.
    """
    recipe, work, linears = job.recipe, job.gradients, job.in_gradients(facts)
    if work is None:
        return
    size = recipe.partition_samples
    partitions = even_ranges(-(-work.samples // size), workers)
    squares = 4 * sum(linear.shape[0] * linear.shape[1] for linear in linears)
    block = _weights(facts.block, recipe) + _gradients(job, facts, linears) + Need(squares + 2 * BAND_BYTES, 0, 0)
    needs = []
    for start, stop in partitions:
        own = max(0, min(stop * size, work.samples) - start * size)
        waiting = max((node_count(start, end) for end in range(start, stop)), default=0)
        kept = at_tier(activations, (work.blocks + 2) * facts.footprint.hidden_bytes * own)
        taking = larger(block + at_tier(placement.statistics, waiting * squares), Need(work.head_bytes, 0, 0))
        needs.append(kept + taking + Need(3 * facts.footprint.hidden_bytes, facts.next_bytes, 0))
    yield "gradients of the loss", needs


def _tuning(job: Job, facts: BlockWork, linears: Sequence[Linear], rank: int, workers: int) -> Need:
    """Return what tuning linears of a block takes: weights, gradients, Adam's moments, and what gradients need.

    Weights, moments and sums in float32 are where a linear is tuned, the compute dtype's and a sample's everywhere.
    """
    sizes = [linear.shape[0] * linear.shape[1] for linear in linears]
    on_disk = sum(linear.shape[0] * linear.shape[1] * linear.item_bytes for linear in linears)
    sums = sum(sizes) * 4 * BATCH_PARTITIONS
    return _gradients(job, facts, linears) + Need(sums + (4 * 4 + 1) * sum(sizes[rank::workers]), 2 * on_disk, 0)


def _gradients(job: Job, facts: BlockWork, linears: Sequence[Linear]) -> Need:
    """Return what one sample's gradients by the weights of some linears take, in the compute dtype and in float32."""
    item = getattr(torch, job.recipe.dtype).itemsize
    size = sum(linear.shape[0] * linear.shape[1] for linear in linears)
    running = facts.footprint.backward_bytes
    return Need(_compute_bytes(facts.block, job.recipe) + (item + 4) * size + running, 0, 0)


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


def _compute_bytes(block: Block, recipe: Recipe) -> int:
    """Return a block's size in the compute dtype."""
    compute = getattr(torch, recipe.dtype)
    sizes = ((tensor.entry.size_bytes, DTYPES.get(tensor.entry.dtype)) for tensor in block.tensors)
    return sum(size if dtype is None else size // dtype.itemsize * compute.itemsize for size, dtype in sizes)
