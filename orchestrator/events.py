"""What a run tells while it goes on: small frozen events, alike for callers, displays, the run's log and metrics.

Each has a text for people, ``str(event)``: so ``progress=print`` shows a run. ``docs/events.md`` is made from what
stands here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from billhook.layerworkers.tasks import LinearReport, Reconstruction

Phase = Literal["plan", "allocate", "gradients", "start", "replay", "eval", "copy", "finish"]

_LABELS: dict[Phase, str] = {
    "plan": "plan",
    "allocate": "allocating",
    "gradients": "taking gradients",
    "start": "starting",
    "replay": "replaying",
    "eval": "evaluating",
    "copy": "copying",
    "finish": "finishing",
}

_BY_BLOCK: tuple[Phase, ...] = ("allocate", "gradients", "replay", "eval")


@dataclass(frozen=True)
class Step:
    """Something other than pruning a block is being done, or done with."""

    phase: Phase
    """`plan`, `allocate`, `gradients` (forward and back), `start` (of Ray and the workers), `replay` (of blocks
    that are done), `eval`, `copy`, `finish`."""
    done: int
    """Of `total`: blocks, where the phase goes through them."""
    total: int
    message: str
    """For people; may be empty."""
    event: Literal["step"] = "step"

    def __str__(self) -> str:
        where = f" block {self.done} of {self.total}" if self.phase in _BY_BLOCK else ""
        return f"{_LABELS[self.phase]}{where}{': ' if self.message else ''}{self.message}"


@dataclass(frozen=True)
class RunBegun:
    """A command begins, or goes on with, a run; everything planned is for a whole run."""

    model: str
    """Folder of the source."""
    method: str
    pattern: str
    sparsity: float
    device: str
    dtype: str
    samples: int
    """Calibration samples; 0: the method needs none."""
    seqlen: int
    """Tokens of each."""
    workers: int
    threads: int
    """Of each worker, on a CPU."""
    blocks: int
    blocks_done: int
    """By earlier commands."""
    linears: int
    """To be pruned, in all blocks."""
    planned_seconds: float
    planned_block_seconds: tuple[float, ...]
    """By block."""
    planned_parts_seconds: tuple[Mapping[str, float], ...]
    """By block: what they are spent on; `files` is meanwhile."""
    planned_moved_bytes: tuple[int, ...]
    """By block: from worker to worker."""
    planned_peak_bytes: Mapping[str, int]
    """`vram` of a worker, `ram` of this node with all processes, `disk` of output and scratch."""
    planned_phase_bytes: Mapping[str, Mapping[str, int]]
    """By phase of the block that needs most: `device` (on a CPU a part of RAM), `ram` beside it, `disk` of scratch."""
    budget_bytes: Mapping[str, int | None]
    """`vram`, `ram`, `disk`; null: no limit."""
    bytes_read: int
    """From the source, planned."""
    bytes_written: int
    """To the output, planned."""
    event: Literal["begun"] = "begun"

    def __str__(self) -> str:
        left = self.blocks - self.blocks_done
        return (
            f"{left} of {self.blocks} blocks to prune with {self.method}, {self.pattern}, sparsity {self.sparsity:g}, "
            f"on {self.workers} {self.device} worker(s)"
        )


@dataclass(frozen=True)
class WorkersStarted:
    """Workers are ready: at the begin, and whenever some were lost or came along."""

    from_block: int
    """The first that they prune."""
    nodes: tuple[str, ...]
    """Address of each worker's node, by rank."""
    hosts: tuple[str, ...]
    """Name of each worker's machine, by rank."""
    event: Literal["workers"] = "workers"

    def __str__(self) -> str:
        return f"{len(self.nodes)} worker(s) on {', '.join(dict.fromkeys(self.nodes))}, from block {self.from_block} on"


@dataclass(frozen=True)
class BlockDone:
    """A block is pruned and committed."""

    index: int
    """From 0."""
    blocks: int
    """How many the model has."""
    began: float
    """Seconds since the epoch."""
    seconds: float
    """Of the slowest worker, from the call to the last result; writing may go on."""
    parts_seconds: Mapping[str, float]
    """What that worker spent them on: `forward`, `statistics`, `factors`, `solving`, `moving` (waiting for others
    included), `files` (waiting only)."""
    worker_seconds: tuple[float, ...]
    """Of each worker, by rank."""
    tokens: int
    """Of the calibration samples, through this block."""
    moved_bytes: int
    """What the workers sent each other, all together."""
    read_bytes: int
    """Of the block's tensors, by all workers together."""
    written_bytes: int
    """Of the block's tensors, to the output."""
    peak_bytes: Mapping[str, int]
    """The most so far in this command: `vram` of a worker, `ram` of this node, `disk` of output and scratch."""
    kept_inputs: bool
    """Whether the inputs of the next block are kept for a resume."""
    linears: tuple[LinearReport, ...]
    """How each came out, in the order of execution."""
    reconstruction: Reconstruction | None = None
    """Of a block that is tuned: the relative squared error of its output, from the dense model's, before and after."""
    event: Literal["block"] = "block"

    def __str__(self) -> str:
        told = f"pruning block {self.index + 1} of {self.blocks}: "
        if not self.linears:
            return f"{told}nothing to prune, {self.seconds:.1f} s"
        worst = max(self.linears, key=lambda linear: linear.error)
        raised = [linear.name for linear in self.linears if len(linear.dampings) > 1]
        notes = f", damping raised for {', '.join(raised)}" if raised else ""
        if starved := [linear for linear in self.linears if linear.fallback]:
            notes += f", {len(starved)} linears of experts that few tokens are sent to: {starved[0].fallback}"
        if self.reconstruction is not None:
            before, after = self.reconstruction.before, self.reconstruction.after
            notes += f", block's error {before:.4f}, tuned to {after:.4f}"
        return (
            f"{told}sparsity {sparsity_of(self.linears):.4f}, largest error {worst.error:.4f} ({worst.name}), "
            f"{self.seconds:.1f} s{notes}"
        )


@dataclass(frozen=True)
class BlockLost:
    """A block was lost with a worker: it is tried again."""

    index: int
    blocks: int
    tries: int
    """So often it was lost in this command."""
    message: str
    """Why."""
    event: Literal["lost"] = "lost"

    def __str__(self) -> str:
        return f"lost block {self.index} of {self.blocks}: {self.message}; trying again"


@dataclass(frozen=True)
class Warned:
    """Something that its user should know of, and that stops nothing."""

    message: str
    event: Literal["warning"] = "warning"

    def __str__(self) -> str:
        return f"warning: {self.message}"


@dataclass(frozen=True)
class RunFinished:
    """The output is complete."""

    seconds: float
    """Of this command."""
    sparsity: float
    """Zeros over elements of the linears pruned."""
    blocks: int
    peak_bytes: Mapping[str, int]
    """As of `block`, of the whole command."""
    event: Literal["finished"] = "finished"

    def __str__(self) -> str:
        return f"finished: {self.blocks} blocks at sparsity {self.sparsity:.4f}, {self.seconds:.1f} s"


@dataclass(frozen=True)
class RunFailed:
    """The command ended early; the run can be gone on with."""

    type: str
    """Class of the error: `RunError`, `Interrupted`, ..."""
    message: str
    event: Literal["failed"] = "failed"

    def __str__(self) -> str:
        return f"ended early: {self.message}"


@dataclass(frozen=True)
class Beat:
    """Workers are alive: told every few seconds while they compute, and not logged."""

    doing: tuple[str, ...]
    """By rank: ``forward``, ``solving``, ... as in ``parts_seconds``, or ``idle``."""
    silent_seconds: tuple[float, ...]
    """By rank: since it was last heard of."""
    ram_bytes: int
    """The most so far in this command, on this node."""

    def __str__(self) -> str:
        return f"workers: {', '.join(self.doing)}"


LoggedEvent = Step | RunBegun | WorkersStarted | BlockDone | BlockLost | Warned | RunFinished | RunFailed

Event = LoggedEvent | Beat

Progress = Callable[[Event], None]
"""What ``progress=`` takes: called in the thread of the caller, in the order of events. What it raises ends the run,
which can be gone on with."""


def no_progress(event: Event) -> None:
    """Tell nobody."""


def together(*listeners: Progress) -> Progress:
    """Return one that tells each of ``listeners``, in their order."""

    def tell(event: Event) -> None:
        for listener in listeners:
            listener(event)

    return tell


def sparsity_of(linears: Sequence[LinearReport]) -> float:
    """Return zeros over elements of the linears pruned."""
    elements = sum(linear.shape[0] * linear.shape[1] for linear in linears)
    return sum(linear.zeros for linear in linears) / elements if elements else 0.0


def errors_by_kind(linears: Sequence[LinearReport]) -> dict[str, float]:
    """Return the mean error of each kind of linear of one block: all experts' linears of a kind are one."""
    errors: dict[str, list[float]] = {}
    for linear in linears:
        errors.setdefault(_kind(linear.name), []).append(linear.error)
    return {kind: math.fsum(own) / len(own) for kind, own in errors.items()}


def _kind(name: str) -> str:
    """Return the name on disk of a linear's weight without what numbers its block and its expert."""
    within = re.split(r"\.\d+\.", name, maxsplit=1)[-1].removesuffix(".weight")
    return re.sub(r"\.\d+\.", ".*.", re.sub(r"\[\d+\]$", "", within))
