"""The pool of workers: one Ray actor per device, called together."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from billhook.cluster.exchange import RayCollective
from billhook.cluster.mailbox import Mailbox
from billhook.layerworkers.errors import InputError, Interrupted, RunError
from billhook.layerworkers.machine import library_versions, machine_facts
from billhook.layerworkers.shards import TensorEntry
from billhook.layerworkers.tasks import (
    BlockReport,
    BlockTask,
    ModuleTensor,
    Sample,
    StemTask,
    WindowLoss,
    WorkerSetup,
)
from billhook.layerworkers.worker import BlockWorker

LAST_CHANCE_SECONDS = 10.0
"""How long the writing of a finished block may go on when the block after it has failed."""

POLL_SECONDS = 0.5
"""How often a call that takes long looks up whether it is to be abandoned."""

Deadline = Callable[[], float | None]
"""Returns the monotonic time at which calls are abandoned; None: never."""


@ray.remote
class WorkerActor:
    """A :class:`BlockWorker` in a process of its own; synchronous, one thread (a greenlet cannot change thread)."""

    def __init__(self, setup: WorkerSetup, mailbox: Any, size: int, rank: int):
        self._setup, self._mailbox, self._group = setup, mailbox, RayCollective(mailbox, range(size), rank)

    def set_up(self) -> dict[str, str]:
        """Build the worker; return what of its machine and libraries decides bits."""
        self._worker = BlockWorker(self._setup, self._group, self._mailbox.synced.remote)
        return machine_facts(self._setup.device) | library_versions()

    def placed(self) -> None:
        """Return as soon as the actor's process runs."""

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of the worker."""
        return getattr(self._worker, method)(*arguments)


class WorkerPool:
    """Workers that make the same calls together; a context manager that ends them.

    deadline: asked again and again; once the time that it returns has come, the call in progress is abandoned.
    expected: what of machine and libraries the output is recorded to depend on; None where it does not matter.

    Raises (all calls):
        Interrupted: when the deadline has passed.
        InputError: as raised in a worker.
        RunError: as raised in a worker; or when a worker died, or none could be placed.
    """

    def __init__(
        self,
        setup: WorkerSetup,
        workers: int,
        deadline: Deadline = lambda: None,
        expected: Mapping[str, str] | None = None,
        placement_timeout_seconds: float = 120.0,
    ):
        self.size = workers
        self._deadline = deadline
        threads = {
            name: str(setup.threads)
            for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
        }
        options = {
            "num_cpus": setup.threads,
            "num_gpus": 1 if setup.device == "cuda" else 0,
            "max_restarts": 0,
            "runtime_env": {"env_vars": threads},
        }
        actor_class: Any = WorkerActor
        self._mailbox: Any = Mailbox.remote()  # type: ignore[attr-defined]
        self._actors = [
            actor_class.options(**options).remote(setup, self._mailbox, workers, rank) for rank in range(workers)
        ]
        try:
            self._outcome([actor.placed.remote() for actor in self._actors], placement_timeout_seconds)
            _check_alike(self._outcome([actor.set_up.remote() for actor in self._actors]), expected)
        except GetTimeoutError as error:
            self.close()
            raise RunError(
                f"{workers} workers of {setup.threads} CPU(s)"
                f"{' and a GPU each' if setup.device == 'cuda' else ''} could not be placed within "
                f"{placement_timeout_seconds:g} s; the cluster has {ray.cluster_resources()}: lower --workers"
            ) from error
        except BaseException:
            self.close()
            raise

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
        before: BlockReport | None = None
        for task in tasks:
            calls = self._submit("prune_block", task)
            if before is not None:
                if not self._reaches_disk(before.index, calls):
                    raise _failure(calls)
                yield before
            before = _slowest(self._outcome(calls))
        if before is not None:
            calls = self._submit("finish_writing")
            if not self._reaches_disk(before.index, calls):
                raise _failure(calls)
            yield before

    def forward_block(
        self, index: int, tensors: Sequence[ModuleTensor], next_tensors: Sequence[ModuleTensor] = ()
    ) -> None:
        """Carry all samples through one block; see :meth:`BlockWorker.forward_block`."""
        self._call("forward_block", index, tensors, next_tensors)

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
        synced = self._mailbox.all_synced.remote(block, self.size)
        pending = list(calls)
        until: float | None = None
        while True:
            done, _ = ray.wait([synced, *pending], timeout=POLL_SECONDS)
            if not done:
                self._check_deadline()
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
                if timeout_seconds is not None and time.monotonic() > begin + timeout_seconds:
                    raise GetTimeoutError("no worker answered")
            for call in done:
                _check(call)
        results: list[Any] = ray.get(calls)
        return results

    def _check_deadline(self) -> None:
        deadline = self._deadline()
        if deadline is not None and time.monotonic() > deadline:
            raise Interrupted("the block in progress was abandoned")

    def close(self) -> None:
        """End all workers; what they hold is lost."""
        for actor in [*self._actors, self._mailbox]:
            with contextlib.suppress(RayError, ValueError):
                ray.kill(actor)


def _failure(calls: list[Any]) -> Exception:
    """Return why a block did not reach the disk, given the calls that were under way."""
    done, _ = ray.wait(calls, num_returns=len(calls), timeout=0)
    for call in done:
        try:
            _check(call)
        except (InputError, RunError) as error:
            return error
    return RunError("Ray lost track of what is on the disk; run the same command again to go on")


def _slowest(reports: list[BlockReport]) -> BlockReport:
    return max(reports, key=lambda report: report.seconds)


def _check_alike(workers: Sequence[Mapping[str, str]], expected: Mapping[str, str] | None) -> None:
    ours = "this command" if expected is not None else "worker 0"
    wanted = workers[0] if expected is None else expected
    for rank, facts in enumerate(workers):
        differing = [
            f"{key} {facts.get(key)!r}, not {wanted[key]!r}" for key in wanted if facts.get(key) != wanted[key]
        ]
        if differing:
            raise InputError(
                f"worker {rank} has {'; '.join(differing)} as {ours} has: results would differ in the last bits; use "
                "machines of one kind with the same libraries"
            )


def _check(call: Any) -> None:
    """Raise the failure of a call that is done, if it failed, as one of ours."""
    try:
        ray.get(call)
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, InputError | RunError):
            raise type(cause)(str(cause)) from None
        raise RunError(f"a worker failed: {error}") from error
    except RayActorError as error:
        raise RunError(
            f"a worker died ({str(error).strip().splitlines()[-1].strip()}): the machine may have run out of "
            "memory; run the same command again to go on from the last finished block"
        ) from error
    except RayError as error:
        raise RunError(f"Ray failed: {error}; run the same command again to go on") from error
