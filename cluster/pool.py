"""The pool of workers: one Ray actor per device, called together."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from billhook.cluster.attendance import Attendance
from billhook.cluster.environment import worker_environment
from billhook.cluster.exchange import Envelope, Inbox, Key, RayCollective
from billhook.cluster.lines import Door, Lines
from billhook.cluster.placement import Reservation, free_places, on_this_node
from billhook.cluster.scribe import RemoteFiles, Scribe
from billhook.cluster.session import inherited
from billhook.layerworkers.access import OutputAccess
from billhook.layerworkers.besa import LearnTask
from billhook.layerworkers.candidates import BranchTask, Deviation
from billhook.layerworkers.errors import BlockLostError, InputError, Interrupted, RunError, UnlikeNodesError
from billhook.layerworkers.machine import library_versions, machine_facts
from billhook.layerworkers.observing import ScoreFacts
from billhook.layerworkers.reverse import ReverseTask
from billhook.layerworkers.shards import TensorEntry
from billhook.layerworkers.source import check_source
from billhook.layerworkers.tasks import (
    BlockReport,
    BlockTask,
    ModuleTensor,
    ObserveTask,
    Sample,
    StemTask,
    WindowComparison,
    WindowLoss,
    WorkerSetup,
)
from billhook.layerworkers.worker import BlockWorker

LAST_CHANCE_SECONDS = 10.0
"""How long the writing of a finished block may go on when the block after it has failed."""

POLL_SECONDS = 0.5
"""How often a call that takes long looks up whether it is to be abandoned."""

BEAT_SECONDS = 2.0
"""How often a worker says that it is alive."""

SILENT_SECONDS = 30.0
"""A worker that has said nothing for so long is taken for dead."""

NOTICE_SECONDS = 5.0
"""How long Ray may take to say that a worker has died, when another has noticed."""

START_SECONDS = 120.0
"""How long the processes of the workers may take to start."""

LOG_BYTES = 2000
"""Of a lost worker's log, what is shown."""

Deadline = Callable[[], float | None]
"""Returns the monotonic time at which calls are abandoned; None: never."""

Heard = Callable[[Mapping[int, tuple[float, str]]], None]
"""Told, while a call goes on, how many seconds ago each rank was heard of, and what it did then."""


@dataclass(frozen=True)
class Whereabouts:
    """Where a worker runs."""

    host: str
    address: str
    node: str
    """Ray's id of the node."""
    pid: int
    log: str
    """File on that node."""
    sees_output: bool
    door: Door | None
    """For the workers of the same node."""


@ray.remote(concurrency_groups={"mail": 1})  # type: ignore[call-overload]
class WorkerActor:
    """A :class:`BlockWorker` in a process of its own.

    It does its work in one thread (a greenlet cannot change thread) and takes in what others send in another.
    """

    def __init__(self, setup: WorkerSetup, attendance: Any, rank: int):
        self._setup, self._attendance, self._rank = setup, attendance, rank
        self._is_called = False
        self._sees_output = _sees(setup.output)
        self._inbox = Inbox()
        self._lines = Lines(self._inbox.put_parts, self._inbox.lose)
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def _beat(self) -> None:
        while True:
            self._attendance.beat.remote(self._rank, self._worker.doing if self._is_called else "idle")
            time.sleep(BEAT_SECONDS)

    @ray.method(concurrency_group="mail")
    def post(self, key: Key, references: list[Any], *body: bytes) -> None:
        """Take in what another worker sends; see :class:`RayCollective`."""
        self._inbox.put(key, Envelope(b"".join(body), references))

    def whereabouts(self) -> Whereabouts:
        """Return where the actor's process runs, as soon as it does."""
        node = ray.get_runtime_context().get_node_id()
        log = ray._private.worker.global_worker.get_err_file_path()
        address = ray.util.get_node_ip_address()
        return Whereabouts(socket.gethostname(), address, node, os.getpid(), log, self._sees_output, self._lines.door)

    def set_up(self, actors: Sequence[Any], doors: Mapping[int, Door], scribe: Any) -> dict[str, str]:
        """Build the worker; return what of its machine and libraries decides bits.

        actors: all workers, by rank. doors: of those on the same machine. scribe: writes the output for those that do
        not see it.
        """
        setup, files = self._setup, None
        if not self._sees_output:
            assert setup.output is not None
            files = RemoteFiles(scribe, self._rank)
            if Path(setup.scratch).is_relative_to(setup.output.folder):
                setup = dataclasses.replace(setup, scratch="")
        check_source(setup.source, f"worker {self._rank} on {socket.gethostname()}, {ray.util.get_node_ip_address()}")
        self._lines.connect(doors)
        self._group = RayCollective(actors, self._inbox, range(len(actors)), self._rank, self._lines)
        synced = self._attendance.synced
        self._worker = BlockWorker(setup, self._group, lambda index: ray.get(synced.remote(index)), files)
        return machine_facts(setup.device) | library_versions()

    def compare_with_another(self, setup: WorkerSetup) -> None:
        """Replace the worker by one of another model, of which the worker so far is the reference."""
        check_source(setup.source, f"worker {self._rank} on {socket.gethostname()}, {ray.util.get_node_ip_address()}")
        self._worker = BlockWorker(setup, self._group, reference=self._worker)

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of the worker."""
        self._is_called = True
        try:
            result = getattr(self._worker, method)(*arguments)
            self._group.settle()  # a message that is lost would be waited for for ever
        finally:
            self._is_called = False
        return result


def _sees(output: OutputAccess | None) -> bool:
    """Whether this machine sees the output, if there is any, and may write there."""
    try:
        return output is None or (os.access(output.lock, os.W_OK) and Path(output.lock).read_text() == output.proof)
    except OSError:
        return False


class WorkerPool:
    """Workers that make the same calls together; a context manager that ends them.

    places: for one worker each; given back when the pool is closed.
    deadline: asked again and again; once the time that it returns has come, the call in progress is abandoned.
    expected: what of machine and libraries the output is recorded to depend on; None where it does not matter.
    heard: listens to the workers' heartbeats.

    Raises (all calls):
        Interrupted: when the deadline has passed.
        InputError: as raised in a worker.
        BlockLostError: when a worker died, or was not heard of for :data:`SILENT_SECONDS`, or failed in a way that is
            none of ours.
        RunError: as raised in a worker.
    """

    def __init__(
        self,
        setup: WorkerSetup,
        places: Reservation,
        deadline: Deadline = lambda: None,
        expected: Mapping[str, str] | None = None,
        heard: Heard = lambda beats: None,
    ):
        self._deadline, self._asked_at, self._heard = deadline, time.monotonic(), heard
        self._places = places
        self.size = places.size
        self.whereabouts: list[Whereabouts] = []
        """By rank."""
        missing = dict(worker_environment(setup.threads).items() - inherited().items())
        same: dict[str, Any] = {"max_restarts": 0}
        if missing:  # Ray takes a second to prepare an environment
            same["runtime_env"] = {"env_vars": missing}
        actor_class: Any = WorkerActor
        self._scribe: Any = None
        self._attendance: Any = Attendance.options(**on_this_node()).remote()  # type: ignore[attr-defined]
        self._actors = [
            actor_class.options(**self._places.options(rank), **same).remote(setup, self._attendance, rank)
            for rank in range(self.size)
        ]
        try:
            self.whereabouts = self._outcome([actor.whereabouts.remote() for actor in self._actors], START_SECONDS)
            if not all(where.sees_output for where in self.whereabouts):
                assert setup.output is not None
                scribe_class: Any = Scribe
                self._scribe = scribe_class.options(**on_this_node()).remote(setup.output, self.size)
            facts = self._outcome(
                [
                    actor.set_up.remote(self._actors, self._neighbours(rank), self._scribe)
                    for rank, actor in enumerate(self._actors)
                ]
            )
            _check_alike(facts, expected, [self._name(rank) for rank in range(self.size)])
        except GetTimeoutError as error:
            self.close()
            raise BlockLostError(f"workers did not start within {START_SECONDS:g} s") from error
        except BaseException:
            self.close()
            raise

    def _neighbours(self, rank: int) -> dict[int, Door]:
        """Return the doors of the other workers on this one's node."""
        return {
            other: where.door
            for other, where in enumerate(self.whereabouts)
            if other != rank and where.node == self.whereabouts[rank].node and where.door is not None
        }

    def has_room(self) -> bool:
        """Whether the cluster has room for another worker."""
        return free_places(self._places.share) > 0

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self, stem: StemTask, samples: Sequence[Sequence[Sample]]) -> None:
        """Give each worker its samples; see :meth:`BlockWorker.start`."""
        self._outcome([actor.call.remote("start", stem, own) for actor, own in zip(self._actors, samples, strict=True)])

    def restore_inputs(self, entry: TensorEntry) -> None:
        """Take up hidden states that were kept; see :meth:`BlockWorker.restore_inputs`."""
        self._call("restore_inputs", entry)

    def prune_blocks(self, tasks: Iterable[BlockTask]) -> Iterator[BlockReport]:
        """Prune blocks on all workers together; see :meth:`BlockWorker.prune_block`.

        A block's report comes once all its tensors are on the disk; by then the next block is under way.
        """
        return self._committed("prune_block", tasks)

    def collect_blocks(self, tasks: Iterable[BlockTask]) -> Iterator[BlockReport]:
        """Write the statistics of blocks; see :meth:`BlockWorker.collect_block`, and :meth:`prune_blocks`."""
        return self._committed("collect_block", tasks)

    def _committed(self, method: str, tasks: Iterable[BlockTask]) -> Iterator[BlockReport]:
        before: BlockReport | None = None
        for task in tasks:
            calls = self._submit(method, task)
            if before is not None:
                if not self._reaches_disk(before.index, calls):
                    raise self._failure(calls)
                yield before
            before = _of_all(self._outcome(calls))
        if before is not None:
            calls = self._submit("finish_writing")
            if not self._reaches_disk(before.index, calls):
                raise self._failure(calls)
            yield before

    def forward_block(
        self,
        index: int,
        tensors: Sequence[ModuleTensor],
        next_tensors: Sequence[ModuleTensor] = (),
        dense_tensors: Sequence[ModuleTensor] = (),
    ) -> None:
        """Carry all samples through one block; see :meth:`BlockWorker.forward_block`."""
        self._call("forward_block", index, tensors, next_tensors, dense_tensors)

    def observe_block(self, task: ObserveTask) -> list[ScoreFacts]:
        """Look at a dense block's scores; see :meth:`BlockWorker.observe_block`."""
        facts: list[ScoreFacts] = self._call("observe_block", task)[0]
        return facts

    def branch_block(self, task: BranchTask) -> list[Deviation]:
        """Carry streams through a block and split them; see :meth:`BlockWorker.branch_block`."""
        deviations: list[Deviation] = self._call("branch_block", task)[0]
        return deviations

    def learn_block(self, task: LearnTask) -> list[float]:
        """Learn how sparse a block's linears should be; see :meth:`BlockWorker.learn_block`."""
        shares: list[float] = self._call("learn_block", task)[0]
        return shares

    def enter_block(
        self, index: int, tensors: Sequence[ModuleTensor], next_tensors: Sequence[ModuleTensor] = ()
    ) -> None:
        """Carry all samples through a dense block; see :meth:`BlockWorker.enter_block`."""
        self._call("enter_block", index, tensors, next_tensors)

    def turn_back(self) -> None:
        """Take gradients of the loss by what left the last block; see :meth:`BlockWorker.turn_back`."""
        self._call("turn_back")

    def leave_block(self, task: ReverseTask) -> None:
        """Take gradients back through the block that was entered last; see :meth:`BlockWorker.leave_block`."""
        self._call("leave_block", task)

    def finish_writing(self) -> None:
        """Wait until all that was written is on the disk; see :meth:`BlockWorker.finish_writing`."""
        self._call("finish_writing")

    def candidate_losses(self) -> list[list[WindowLoss]]:
        """Return the losses of all samples, in order, for each stream; see :meth:`BlockWorker.candidate_losses`."""
        by_worker: list[list[list[WindowLoss]]] = self._call("candidate_losses")
        return [[loss for own in stream for loss in own] for stream in zip(*by_worker, strict=True)]

    def compare_with_another(self, setup: WorkerSetup) -> None:
        """Go on with another model, from :meth:`start` on; what the model so far has made of the samples is kept."""
        self._outcome([actor.compare_with_another.remote(setup) for actor in self._actors])

    def comparisons(self) -> list[WindowComparison]:
        """Return how far the model is from the one before; see :meth:`BlockWorker.comparisons`."""
        return [each for own in self._call("comparisons") for each in own]

    def losses(self) -> list[WindowLoss]:
        """Return the losses of all samples, in order; see :meth:`BlockWorker.losses`."""
        return [loss for own in self._call("losses") for loss in own]

    def peak_vram_bytes(self) -> int:
        """Return the most memory that torch has held on any worker's GPU; 0 on CPUs."""
        peaks: list[int] = self._call("peak_vram_bytes")
        return max(peaks)

    def scratch_bytes(self) -> int:
        """Return the most that the workers have had in their scratch files, together."""
        return int(sum(self._call("scratch_bytes")))

    def _call(self, method: str, *arguments: Any) -> list[Any]:
        return self._outcome(self._submit(method, *arguments))

    def _submit(self, method: str, *arguments: Any) -> list[Any]:
        return [actor.call.remote(method, *arguments) for actor in self._actors]

    def _reaches_disk(self, block: int, calls: Sequence[Any]) -> bool:
        """Wait until all workers have their share of ``block`` on the disk; False when that is not to be expected.

        A failure of ``calls``, the next block's, need not be one of this block's writing: that gets a last chance.
        """
        synced = self._attendance.all_synced.remote(block, self.size)
        pending = list(calls)
        until: float | None = None
        while True:
            done, _ = ray.wait([synced, *pending], timeout=POLL_SECONDS)
            if not done:
                self._check_deadline()
                self._check_heard()
                if until is not None and time.monotonic() > until:
                    return False
                continue
            try:
                ray.get(done[0])
            except RayError:
                if done[0] == synced:
                    return False
                until = until or time.monotonic() + LAST_CHANCE_SECONDS
            if done[0] == synced:
                return True
            pending.remove(done[0])

    def _outcome(self, calls: list[Any], timeout_seconds: float | None = None) -> list[Any]:
        """Wait for all calls; the first that fails decides, since the others may wait for it for ever."""
        pending, begin = list(calls), time.monotonic()
        while pending:
            done, pending = ray.wait(pending, timeout=POLL_SECONDS)
            if not done:
                self._check_deadline()
                self._check_heard()
                if timeout_seconds is not None and time.monotonic() > begin + timeout_seconds:
                    raise GetTimeoutError("no worker answered")
            for call in done:
                self._check(call, calls)
        results: list[Any] = ray.get(calls)
        return results

    def _failure(self, calls: Sequence[Any]) -> Exception:
        """Return why a block did not reach the disk, given the calls that were under way."""
        done, _ = ray.wait(list(calls), num_returns=len(calls), timeout=0)
        for call in done:
            try:
                self._check(call, calls)
            except (InputError, RunError) as error:
                return error
        return BlockLostError("Ray lost track of what is on the disk")

    def _check_heard(self) -> None:
        """Raise when a worker has not been heard of for too long."""
        if time.monotonic() < self._asked_at + BEAT_SECONDS:
            return
        self._asked_at = time.monotonic()
        try:
            beats = ray.get(self._attendance.heard.remote(), timeout=SILENT_SECONDS)
        except RayError as error:
            raise BlockLostError(f"nobody tells which workers are alive: {error}") from error
        for rank, (seconds, _) in beats.items():
            if seconds > SILENT_SECONDS:
                raise self._lost(rank, f"was not heard of for {SILENT_SECONDS:g} s")
        self._heard(beats)

    def _check(self, call: Any, calls: Sequence[Any]) -> None:
        """Raise the failure of one of ``calls`` (by rank) that is done, if it failed, as one of ours."""
        try:
            ray.get(call)
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, InputError | RunError):
                raise type(cause)(str(cause)) from None
            if isinstance(cause, RayError | ConnectionError):  # in the middle of an exchange with one that died
                dead = self._dead_among(calls)
                raise dead or BlockLostError(f"a worker lost touch with another: {cause}") from error
            raise BlockLostError(f"a worker failed: {error}") from error
        except RayActorError as error:
            raise self._died(list(calls).index(call), error) from error
        except RayError as error:
            raise BlockLostError(f"Ray failed: {error}") from error

    def _dead_among(self, calls: Sequence[Any]) -> BlockLostError | None:
        """Return who has died, once Ray says so; None where it does not within :data:`NOTICE_SECONDS`."""
        pending, until = list(calls), time.monotonic() + NOTICE_SECONDS
        while pending and (left := until - time.monotonic()) > 0:
            done, pending = ray.wait(pending, timeout=left)
            for call in done:
                try:
                    ray.get(call)
                except RayTaskError:
                    pass  # as lost as we are
                except RayActorError as error:
                    return self._died(list(calls).index(call), error)
                except RayError:
                    pass
        return None

    def _died(self, rank: int, error: RayActorError) -> BlockLostError:
        reason = str(error).strip().splitlines()[-1].partition("Some common causes")[0].strip()
        return self._lost(rank, f"died ({reason}); its machine may have run out of memory")

    def _lost(self, rank: int, what: str) -> BlockLostError:
        log = _tail(self.whereabouts[rank]) if self.whereabouts else ""
        told = f"; the end of its log:\n{log}" if log else ""
        return BlockLostError(f"{self._name(rank)} {what}{told}")

    def _name(self, rank: int) -> str:
        if not self.whereabouts:
            return f"worker {rank}"
        where = self.whereabouts[rank]
        return f"worker {rank} (process {where.pid} on {where.host}, {where.address})"

    def _check_deadline(self) -> None:
        deadline = self._deadline()
        if deadline is not None and time.monotonic() > deadline:
            raise Interrupted("the block in progress was abandoned")

    def close(self) -> None:
        """End all workers; what they hold is lost."""
        for actor in [*self._actors, self._attendance, *([self._scribe] if self._scribe is not None else [])]:
            with contextlib.suppress(RayError, ValueError):
                ray.kill(actor)
        with contextlib.suppress(RayError, ValueError):
            self._places.release()


def _of_all(reports: list[BlockReport]) -> BlockReport:
    slowest = max(reports, key=lambda report: report.seconds)
    return dataclasses.replace(
        slowest,
        moved_bytes=sum(report.moved_bytes for report in reports),
        vram_bytes=max(report.vram_bytes for report in reports),
        scratch_bytes=sum(report.scratch_bytes for report in reports),
        worker_seconds=tuple(report.seconds for report in reports),
    )


def _check_alike(
    workers: Sequence[Mapping[str, str]], expected: Mapping[str, str] | None, names: Sequence[str]
) -> None:
    ours = "this command" if expected is not None else names[0]
    wanted = workers[0] if expected is None else expected
    for name, facts in zip(names, workers, strict=True):
        differing = [
            f"{key} {facts.get(key)!r}, not {wanted[key]!r}" for key in wanted if facts.get(key) != wanted[key]
        ]
        if differing:
            raise UnlikeNodesError(
                f"{name} has {'; '.join(differing)} as {ours} has: results would differ in the last bits; use machines "
                "of one kind with the same libraries"
            )


def _tail(where: Whereabouts) -> str:
    """Return the last lines of a worker's log; empty where they cannot be had."""
    if where.node == ray.get_runtime_context().get_node_id():
        return _read_tail(where.log)
    there = NodeAffinitySchedulingStrategy(where.node, soft=False)
    call: Any = ray.remote(_read_tail)
    try:
        tail: str = ray.get(call.options(num_cpus=0, scheduling_strategy=there).remote(where.log), timeout=10)
    except RayError:  # the node is gone, too
        return ""
    return tail


def _read_tail(path: str) -> str:
    try:
        lines = Path(path).read_bytes()[-LOG_BYTES:].decode(errors="replace").splitlines()
    except OSError:
        return ""
    return "\n".join(line for line in lines if line and not line.startswith((":job_id:", ":actor_name:")))
