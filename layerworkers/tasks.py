"""What the driver tells a worker, and what a worker tells back: plain frozen data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from billhook.layerworkers.access import OutputAccess
from billhook.layerworkers.patterns import Pattern
from billhook.layerworkers.shards import TensorEntry
from billhook.layerworkers.sharing import Pace
from billhook.layerworkers.source import Source


@dataclass(frozen=True)
class WorkerSetup:
    """How a worker computes, for its whole life."""

    source: Source
    dtype: str
    """Compute dtype, a torch name such as ``bfloat16``."""
    device: str
    """``cpu`` or ``cuda``."""
    threads: int
    trust_remote_code: bool
    activations: str = "device"
    """Where hidden states wait between blocks: ``device``, ``ram`` or ``disk``; never changes bytes."""
    scratch: str = ""
    """Folder for what is kept on ``disk``; empty: the system's for temporary files."""
    output: OutputAccess | None = None
    """None: nothing is written."""
    separate_experts: bool | None = None
    """Whether each expert has tensors of its own on disk; None: as transformers would save them."""
    route_all: bool = False
    """Whether each expert is fitted to all tokens, rather than to those that are sent to it."""
    dense_stream: bool = False
    """Whether the samples are also carried through the dense model, beside the sparse one."""


@dataclass(frozen=True)
class Sample:
    """One calibration sample or evaluation window."""

    index: int
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class ModuleTensor:
    """A tensor on disk and the parameter or buffer of the skeleton that it becomes."""

    module_name: str
    entry: TensorEntry


@dataclass(frozen=True)
class StemTask:
    """What surrounds the blocks: small parameters to load, and the matrices that are read by rows."""

    tensors: tuple[ModuleTensor, ...]
    embedding: TensorEntry
    head: TensorEntry


@dataclass(frozen=True)
class Placement:
    """Where a worker keeps what, while it works on a block; decides memory and time, never bytes."""

    intermediates: str = "hold"
    """``hold``, ``spill`` or ``replay``: see :mod:`billhook.layerworkers.lockstep`."""
    spill_to: str = "disk"
    """``ram`` or ``disk``: where ``spill`` parks them."""
    statistics: str = "device"
    """``device``, ``ram`` or ``disk``: where partial sums wait for their siblings."""
    read_ahead: bool = True
    """Whether the next block is read while this one is computed."""
    experts_at_once: int = 0
    """Experts of a layer that are computed, and solved, together; 0: all."""


FALLBACKS = ("pool", "magnitude", "dense")
"""What :class:`Coverage` may name."""


@dataclass(frozen=True)
class Coverage:
    """How many tokens an expert needs, and what becomes of one that has fewer."""

    tokens_per_channel: float = 1.0
    """Tokens for each channel of its widest input. With fewer than one, its Gram matrix is singular."""
    fallback: str = "pool"
    """``pool``: it is fitted to all tokens of its layer; ``magnitude``: its smallest weights go; ``dense``: none do."""


@dataclass(frozen=True)
class LinearTask:
    """One linear to be pruned."""

    disk_name: str
    """Name of its weight on disk."""
    name: str
    """Name of the module within the block."""
    pattern: Pattern
    method: str
    options: Any
    """The method's own frozen dataclass of options."""
    correction: float = 0.0
    """Share of the deviation from the dense model's stream that its target takes back: see :mod:`.lockstep`."""


@dataclass(frozen=True)
class Tuning:
    """How what is kept of a block is tuned; see :mod:`billhook.layerworkers.reconstruction`."""

    epochs: int = 0
    """Passes over the samples; 0: it is left as it was solved."""
    rate: float = 0.0
    """Of Adam, in the first step, relative to the root mean square of what is kept of a linear; it falls to 0 on a
    straight line."""


@dataclass(frozen=True)
class BlockTask:
    """One block: its tensors, the linears to prune, and where the result is written."""

    index: int
    tensors: tuple[ModuleTensor, ...]
    others: tuple[TensorEntry, ...]
    """Tensors on disk that belong to the block but to no parameter of it: copied only."""
    linears: tuple[LinearTask, ...]
    fit: str
    """``lockstep``, or ``dense-block``: see :meth:`BlockWorker.prune_block`."""
    output: str
    """Folder of the output; a tensor goes to the same shard and offset as in the source, in a ``.part`` file."""
    partition_samples: int
    """Consecutive samples whose statistics are summed together."""
    partitions: int
    """Partitions of the samples, over all workers."""
    partition_rows: int
    placement: Placement = Placement()
    next_tensors: tuple[ModuleTensor, ...] = ()
    """What will be loaded after this block; read while it is computed, if so placed."""
    keep: TensorEntry | None = None
    """Where the samples' hidden states are kept once they left the block, row by row of sample index; None: nowhere."""
    pace: Pace = Pace()
    """It decides how the solves are shared out, never bytes."""
    coverage: Coverage = Coverage()
    collected: Mapping[str, TensorEntry] = field(default_factory=dict)
    """Where the statistics of inputs lie, by the first of the linears that share one, where these were collected before
    and no sample is run; or, for :meth:`BlockWorker.collect_block`, where they are written."""
    tuning: Tuning = Tuning()
    gradients: Mapping[str, TensorEntry] = field(default_factory=dict)
    """Where the root mean squares of the gradients of the model's loss lie, by names of weights on disk, of those whose
    methods ask for them."""


@dataclass(frozen=True)
class ObserveTask:
    """One dense block whose scores are looked at."""

    index: int
    tensors: tuple[ModuleTensor, ...]
    linears: tuple[tuple[str, str], ...]
    """Names in the block, and on disk, of the linears that count."""
    partition_samples: int
    partitions: int
    """As of :class:`BlockTask`."""
    multiple: float
    """See :func:`billhook.layerworkers.observing.observe_scores`."""
    next_tensors: tuple[ModuleTensor, ...] = ()
    """What will be loaded after this block; read while it is computed."""


@dataclass(frozen=True)
class LinearReport:
    """How one linear came out."""

    name: str
    """Name of its weight on disk."""
    shape: tuple[int, int]
    pattern: str
    method: str
    removed: int
    """Entries that the method chose to remove: exactly what the pattern asks for."""
    zeros: int
    """Zeros as written: more than ``removed`` only where kept weights were or became 0."""
    error: float
    """Relative squared error of the linear's output, as the method measures it (see its docstring)."""
    dampings: tuple[float, ...]
    """Relative dampings or ridges tried until the factorisation succeeded; empty where there is none."""
    transposed: bool = False
    """Whether it is stored as its transpose; ``shape`` is outputs by inputs all the same."""
    tokens: int | None = None
    """Calibration tokens that its expert is sent; None where it belongs to none, or is not fitted to these."""
    fallback: str = ""
    """What was done because these were too few: one of :data:`FALLBACKS`."""


@dataclass(frozen=True)
class Reconstruction:
    """How far a block's output is from the dense model's: the mean over tokens of the relative squared error."""

    before: float
    """As the linears were solved."""
    after: float
    """After what is kept was tuned; the same where that did not help, and nothing was changed."""


@dataclass(frozen=True)
class BlockReport:
    """How one block came out: a worker tells its own times and bytes, the pool those of all."""

    index: int
    linears: tuple[LinearReport, ...]
    began: float = 0.0
    """Seconds since the epoch."""
    seconds: float = 0.0
    """Of the slowest worker, from the call to the last result; writing may go on."""
    parts_seconds: Mapping[str, float] = field(default_factory=dict)
    """What that worker spent them on: see :mod:`billhook.layerworkers.stopwatch`."""
    moved_bytes: int = 0
    """What the workers moved to each other, all together: see :class:`billhook.layerworkers.collective.Counted`."""
    vram_bytes: int = 0
    """The most that torch has held on a worker's GPU so far."""
    scratch_bytes: int = 0
    """The most that the workers have had in their scratch files so far, together."""
    worker_seconds: tuple[float, ...] = ()
    """``seconds`` of each worker, by rank."""
    reconstruction: Reconstruction | None = None
    """Where what is kept was tuned."""


@dataclass(frozen=True)
class WindowLoss:
    """Mean cross-entropy of one evaluation window, in nats per target token."""

    index: int
    nats: float
    targets: int


@dataclass(frozen=True)
class WindowComparison:
    """How far a model's predictions of one evaluation window are from those of a reference."""

    loss: WindowLoss
    reference_nats: float
    """Mean cross-entropy of the reference, per target token."""
    divergence_nats: float
    """Mean KL divergence from the reference's probabilities, per target token."""
    agreeing: int
    """Targets before which both hold the same token to be the likeliest."""
