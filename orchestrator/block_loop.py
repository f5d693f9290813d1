"""Commit block after block, with whatever workers there are: a lost one costs a block, a new one is used."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from billhook.layerworkers.access import OutputAccess
from billhook.layerworkers.errors import BlockLostError, InputError, Interrupted, NoWorkersError, RunError
from billhook.layerworkers.tasks import BlockReport, BlockTask, ModuleTensor, Sample
from billhook.orchestrator import output as out
from billhook.orchestrator.calibration import Windows, deal_samples
from billhook.orchestrator.events import Beat, BlockDone, BlockLost, Progress, Step, WorkersStarted
from billhook.orchestrator.history import History, read_history
from billhook.orchestrator.interruption import Interruption
from billhook.orchestrator.journal import FOLDER, append
from billhook.orchestrator.keeping import create_kept, find_kept, kept_size_bytes, remove_kept
from billhook.orchestrator.paths import user_path
from billhook.orchestrator.planning import Plan, with_workers
from billhook.orchestrator.workers import PATIENCE_SECONDS, ray_for, reserve_places, start_pool

if TYPE_CHECKING:
    from billhook.cluster.memory import PeakMemory
    from billhook.cluster.placement import Reservation
    from billhook.cluster.pool import Whereabouts, WorkerPool

TRIES = 3
"""So often a block is tried with new workers before the run gives up."""

RESTART_PATIENCE_SECONDS = 15.0
"""How long to wait, after workers were lost, for the places that they had."""


@dataclass(frozen=True)
class Run:
    """What a run is, whatever workers it has."""

    plan: Plan
    windows: Windows | None
    access: OutputAccess
    output: Path
    lock: out.Lock
    report: Progress
    interruption: Interruption

    @property
    def blocks(self) -> int:
        """How many the model has."""
        return len(self.plan.request.model.layout.blocks)


def commit_blocks(run: Run) -> dict[str, int]:
    """Prune and commit every block that is not committed yet; return peaks by tier.

    Raises:
        Interrupted: when asked to end.
        InputError, RunError: as the pool does, or when a block was lost :data:`TRIES` times.
    """
    workers, device = run.plan.workers, run.plan.request.model.device
    peak = {"vram": 0, "ram": 0, "disk": 0}
    lost: Counter[int] = Counter()
    size, wanted = 0, workers.count
    patience = PATIENCE_SECONDS if workers.most == workers.count else 0.0  # the number may be left to us
    with ray_for(workers, device, run.report) as memory:
        while len(read_history(run.output).blocks) < run.blocks:
            _check_asked(run.interruption)
            try:
                places = reserve_places(workers, device, wanted, patience)
                in_vain = 0 < size < wanted and places.size <= size
                size = places.size
                used = _use(run, places, memory, may_grow=not in_vain)
                peak = {tier: max(peak[tier], used[tier]) for tier in peak}
                wanted = size + 1
            except BlockLostError as error:
                if run.interruption.asked:
                    raise Interrupted(str(error)) from error
                run.lock.check()
                block = len(read_history(run.output).blocks)
                lost[block] += 1
                if lost[block] == TRIES:
                    raise BlockLostError(
                        f"block {block} failed {TRIES} times, the last time so: {error}\n"
                        "The same command goes on from there"
                    ) from error
                append(run.output, "lost", {"index": block, "message": str(error)})
                run.report(BlockLost(block, run.blocks, lost[block], str(error)))
                wanted = size
            patience = RESTART_PATIENCE_SECONDS
        _check_asked(run.interruption)
    return {**peak, "ram": memory.peak_bytes}


def _use(run: Run, places: Reservation, memory: PeakMemory, may_grow: bool) -> dict[str, int]:
    """Commit blocks with one pool, until all are or, if it ``may_grow``, there is room for more workers."""
    try:
        plan = with_workers(run.plan, places.size)
    except InputError as error:
        raise NoWorkersError(
            f"there is room for {places.size} of {run.plan.workers.count} workers only: {error}"
        ) from error
    history = read_history(run.output)
    scratch = str(user_path(plan.resources.scratch) if plan.resources.scratch else run.output / FOLDER)
    model = plan.request.model
    streams = plan.request.streams
    setup = model.worker_setup(
        plan.workers.threads, plan.arrangement.activations, scratch, run.access, dense_stream=streams > 1
    )
    recorded = history.decided[-1].fingerprint
    expected = recorded["machine"] | recorded["versions"]
    kept_bytes, disk_bytes, kept = 0, 0, set[int]()
    if history.kept_inputs is not None:
        kept.add(history.kept_inputs)

    def heard(beats: Mapping[int, tuple[float, str]]) -> None:
        doing, silent = tuple(doing for _, doing in beats.values()), tuple(seconds for seconds, _ in beats.values())
        run.report(Beat(doing, silent, memory.peak_bytes))

    with (
        start_pool(setup, places, run.interruption.deadline, expected, heard) as pool,
        run.interruption.polled(),
    ):
        if plan.resources.address is not None:
            run.report(Step("start", 0, 1, _who(pool.whereabouts, run.plan.workers.count)))
        nodes, hosts = zip(*((where.address, where.host) for where in pool.whereabouts), strict=True)
        run.report(WorkersStarted(len(history.blocks), nodes, hosts))
        samples = [list[Sample]()] * pool.size
        if run.windows is not None:
            samples = deal_samples(run.windows, plan.request.recipe.partition_samples, pool.size)
        pool.start(model.layout.stem, samples)
        if run.windows is not None:
            _carry_on(run, plan, pool, samples, history)
        work = pool.prune_blocks if plan.request.collects is None else pool.collect_blocks
        for done in work(_tasks(run, plan, pool, len(history.blocks), kept, may_grow)):
            run.lock.check()
            keeps = done.index + 1 in kept
            linears = [dataclasses.asdict(linear) for linear in done.linears]
            seconds = round(done.seconds, 3)
            line = {"index": done.index, "linears": linears, "seconds": seconds, "kept_inputs": keeps}
            append(run.output, "block", line)
            disk_bytes = max(disk_bytes, out.size_bytes(run.output) + done.scratch_bytes)
            if keeps:
                kept_bytes = max(kept_bytes, kept_size_bytes(run.output))
                remove_kept(run.output, before=done.index + 1)
            peak = {"vram": done.vram_bytes, "ram": memory.peak_bytes, "disk": disk_bytes}
            run.report(_told(done, plan, peak, keeps))
        return {"vram": pool.peak_vram_bytes(), "ram": 0, "disk": pool.scratch_bytes() + kept_bytes}


def _who(workers: Sequence[Whereabouts], asked: int) -> str:
    """Say how many workers there are of those that were asked for, where, and who does not see the output."""
    counts = Counter(where.address for where in workers)
    unseen = sorted({where.address for where in workers if not where.sees_output})
    told = f"{len(workers)} of {asked} worker(s): {', '.join(f'{n} on {address}' for address, n in counts.items())}"
    return told + (f"; {', '.join(unseen)} cannot write to the output: this machine does it for them" if unseen else "")


def _carry_on(run: Run, plan: Plan, pool: WorkerPool, samples: list[list[Sample]], history: History) -> None:
    """Carry the samples through the committed blocks, from the last kept inputs on."""
    blocks, committed, begin = plan.request.model.layout.blocks, len(history.blocks), 0
    if history.kept_inputs is not None:
        kept = find_kept(run.output, history.kept_inputs, plan.kept_rows, plan.hidden_bytes)
        try:
            if kept is not None:
                pool.restore_inputs(kept)
                begin = history.kept_inputs
        except BlockLostError:
            raise
        except RunError:  # they cannot be read: replay everything
            pool.start(plan.request.model.layout.stem, samples)
    for block in blocks[begin:committed]:
        _check_asked(run.interruption)
        ahead = plan.arrangement.placements[block.index].read_ahead
        later = blocks[block.index + 1 : committed][:1] if ahead else ()
        tensors = [each.tensors for each in (block, *later)]
        if plan.request.collects is None:
            tensors = [_in_output(each, run.output) for each in tensors]
        dense = block.tensors if plan.request.streams > 1 else ()
        pool.forward_block(block.index, tensors[0], tensors[1] if later else (), dense)
        run.report(Step("replay", block.index + 1, len(blocks), ""))


def _tasks(run: Run, plan: Plan, pool: WorkerPool, first: int, kept: set[int], may_grow: bool) -> Iterator[BlockTask]:
    """Yield the tasks of the blocks from ``first`` on, until asked to end, or until there is room for more workers.

    kept: blocks whose inputs are kept; those to come are added. A larger pool begins where inputs are kept, so that it
    need not replay: at this block, or else the next.
    """
    blocks = plan.request.model.layout.blocks
    for block in blocks[first:]:
        if run.interruption.asked:
            return
        after, keep = block.index + 1, None
        grow = may_grow and pool.size < plan.workers.most and after < len(blocks) and pool.has_room()
        if grow and block.index > first and (block.index in kept or run.windows is None):
            return
        if plan.keeps_inputs_of(after) or (grow and run.windows is not None):
            with contextlib.suppress(RunError):  # a run can do without
                keep = create_kept(run.output, after, plan.kept_rows, plan.hidden_bytes)
                kept.add(after)
        yield plan.task(block.index, run.output, keep)


def _check_asked(interruption: Interruption) -> None:
    if interruption.asked:
        raise Interrupted("ended between two blocks")


def _in_output(tensors: Sequence[ModuleTensor], output: Path) -> tuple[ModuleTensor, ...]:
    """Return the tensors as they lie in the unfinished output: the same offsets in its own shards."""
    return tuple(
        dataclasses.replace(
            tensor, entry=dataclasses.replace(tensor.entry, path=f"{output}/{Path(tensor.entry.path).name}.part")
        )
        for tensor in tensors
    )


def _told(done: BlockReport, plan: Plan, peak_bytes: Mapping[str, int], keeps: bool) -> BlockDone:
    """Return what is told of a block."""
    recipe, block = plan.request.recipe, plan.request.model.layout.blocks[done.index]
    read = sum(tensor.entry.size_bytes for tensor in block.tensors)
    return BlockDone(
        done.index,
        len(plan.request.model.layout.blocks),
        done.began,
        done.seconds,
        done.parts_seconds,
        done.worker_seconds,
        plan.request.samples * (recipe.seqlen or 0),
        done.moved_bytes,
        read * len(done.worker_seconds),
        read + sum(entry.size_bytes for entry in block.others),
        peak_bytes,
        keeps,
        done.linears,
        done.reconstruction,
    )
