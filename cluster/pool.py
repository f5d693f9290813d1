"""The pool of workers: one Ray actor per device, called together."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from billhook.cluster.exchange import RayCollective
from billhook.cluster.mailbox import Mailbox
from billhook.layerworkers.errors import InputError, RunError
from billhook.layerworkers.machine import machine_facts
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


@ray.remote
class WorkerActor:
    """A :class:`BlockWorker` in a process of its own; synchronous, one thread (a greenlet cannot change thread)."""

    def __init__(self, setup: WorkerSetup, mailbox: Any, size: int, rank: int):
        self._setup, self._mailbox, self._group = setup, mailbox, RayCollective(mailbox, range(size), rank)

    def set_up(self) -> dict[str, str]:
        """Build the worker; return what of its machine decides bits."""
        self._worker = BlockWorker(self._setup, self._group, self._mailbox.synced.remote)
        return machine_facts(self._setup.device)

    def placed(self) -> None:
        """Return as soon as the actor's process runs."""

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of the worker."""
        return getattr(self._worker, method)(*arguments)


class WorkerPool:
    """Workers that make the same calls together; a context manager that ends them.

    Raises (all calls):
        InputError: as raised in a worker.
        RunError: as raised in a worker; or when a worker died, or none could be placed.
    """

    def __init__(self, setup: WorkerSetup, workers: int, placement_timeout_seconds: float = 120.0):
        self.size = workers
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
            _outcome([actor.placed.remote() for actor in self._actors], placement_timeout_seconds)
            _check_alike(_outcome([actor.set_up.remote() for actor in self._actors]))
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
        _outcome([actor.call.remote("start", stem, own) for actor, own in zip(self._actors, samples, strict=True)])

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
            before = _slowest(_outcome(calls))
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
        return _outcome(self._submit(method, *arguments))

    def _submit(self, method: str, *arguments: Any) -> list[Any]:
        return [actor.call.remote(method, *arguments) for actor in self._actors]

    def _reaches_disk(self, block: int, calls: Sequence[Any]) -> bool:
        """Wait until all workers have their share of ``block`` on the disk; False when that is not to be expected.

        A failure of ``calls``, the next block's, need not be one of this block's writing: that gets a last chance.
        """
        synced = self._mailbox.all_synced.remote(block, self.size)
        pending = list(calls)
        seconds: float | None = None
        while True:
            done, _ = ray.wait([synced, *pending], timeout=seconds)
            if not done:
                return False
            try:
                ray.get(done[0])
            except RayError:
                if done[0] == synced:
                    return False
                seconds = LAST_CHANCE_SECONDS
            if done[0] == synced:
                return True
            pending.remove(done[0])

    def close(self) -> None:
        """End all workers; what they hold is lost."""
        for actor in [*self._actors, self._mailbox]:
            with contextlib.suppress(RayError, ValueError):
                ray.kill(actor)


def _failure(calls: list[Any]) -> Exception:
    """Return why a block did not reach the disk, given the calls that were under way."""
    try:
        _outcome(calls)
    except (InputError, RunError) as error:
        return error
    return RunError("Ray lost track of what is on the disk; run the same command again to go on")


def _slowest(reports: list[BlockReport]) -> BlockReport:
    return max(reports, key=lambda report: report.seconds)


def _check_alike(machines: list[dict[str, str]]) -> None:
    for rank, facts in enumerate(machines):
        if facts != machines[0]:
            raise InputError(
                f"worker {rank} runs on {facts}, worker 0 on {machines[0]}: their results would differ in the last "
                "bits; use machines of one kind"
            )


def _outcome(calls: list[Any], timeout_seconds: float | None = None) -> list[Any]:
    """Wait for all calls; the first that fails decides, since the others may wait for it for ever."""
    pending = list(calls)
    while pending:
        done, pending = ray.wait(pending, timeout=timeout_seconds)
        if not done:
            raise GetTimeoutError("no worker answered")
        try:
            ray.get(done)
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
    results: list[Any] = ray.get(calls)
    return results
