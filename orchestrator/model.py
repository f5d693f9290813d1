"""A model opened from its folder: checkpoint, config and layout; no weight is read."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from billhook.layerworkers.access import OutputAccess
from billhook.layerworkers.errors import CheckpointError, OptionError
from billhook.layerworkers.experts import are_separate
from billhook.layerworkers.skeleton import Skeleton
from billhook.layerworkers.tasks import WorkerSetup
from billhook.orchestrator.checkpoint import (
    Checkpoint,
    has_weights,
    imagined_checkpoint,
    open_checkpoint,
    read_config,
    resolve_model,
)
from billhook.orchestrator.layout import Layout, lay_out


@dataclass(frozen=True)
class Model:
    """A source model and how it is computed with."""

    checkpoint: Checkpoint
    config: Any
    """The transformers config."""
    layout: Layout
    device: str
    """``cpu`` or ``cuda``."""
    dtype: str
    """Compute dtype, a torch name."""
    trust_remote_code: bool
    separate_experts: bool | None
    """Whether each expert has tensors of its own on disk; None: as transformers would save them."""
    route_all: bool
    """Whether each expert is fitted to all tokens."""
    skeleton: Skeleton

    def worker_setup(
        self,
        threads: int,
        activations: str = "device",
        scratch: str = "",
        output: OutputAccess | None = None,
        dense_stream: bool = False,
    ) -> WorkerSetup:
        """Return how a worker with ``threads`` CPU threads computes with this model; see :class:`WorkerSetup`."""
        return WorkerSetup(
            self.checkpoint.source(),
            self.dtype,
            self.device,
            threads,
            self.trust_remote_code,
            activations,
            scratch,
            output,
            self.separate_experts,
            self.route_all,
            dense_stream,
        )


def open_model(
    model: str | Path,
    device: str,
    dtype: str,
    trust_remote_code: bool,
    weights_needed: bool = True,
    device_needed: bool = True,
    route_all: bool = False,
) -> Model:
    """Open a folder or hub id; ``device`` and ``dtype`` may be ``auto``.

    weights_needed: if not, a folder with a config and no weights will do; the shapes are then what the config implies.
    device_needed: if not, a device that this machine lacks will do. route_all: experts are fitted to all tokens.

    Raises:
        InputError: for anything wrong with the model.
    """
    device = _resolve_device(device) if device_needed else device
    folder = resolve_model(model)
    if not any(folder.iterdir()):
        raise CheckpointError(f"{folder}: the folder is empty; expected a Hugging Face model folder")
    config = read_config(folder)
    if weights_needed or has_weights(folder):
        checkpoint = open_checkpoint(folder)
        compute = _resolve_dtype(dtype, device, _main_dtype(checkpoint))
        separate = are_separate(checkpoint.tensors)
        skeleton = Skeleton(
            folder, getattr(torch, compute), torch.device("cpu"), trust_remote_code, separate, route_all
        )
    else:
        stored = _named_dtype(config)
        compute = _resolve_dtype(dtype, device, stored)
        separate = None
        skeleton = Skeleton(folder, getattr(torch, compute), torch.device("cpu"), trust_remote_code, None, route_all)
        checkpoint = imagined_checkpoint(folder, skeleton.names.disk_shapes(), stored)
    return Model(
        checkpoint,
        skeleton.config,
        lay_out(checkpoint, skeleton),
        device,
        compute,
        trust_remote_code,
        separate,
        route_all,
        skeleton,
    )


def resolve_workers(workers: int | str, device: str, threads: int, useful: int) -> int:
    """Return the number of workers; ``auto`` is one per GPU, or per ``threads`` CPU cores, and ``useful`` at most."""
    if isinstance(workers, int):
        return workers
    available = torch.cuda.device_count() if device == "cuda" else len(os.sched_getaffinity(0)) // threads
    return max(1, min(available, useful))


def check_gpus(workers: int, device: str, address: str | None) -> None:
    """Check that this machine has a GPU for each worker, where the workers run on it.

    Raises:
        InputError: when it has not.
    """
    if device == "cuda" and address is None and workers > torch.cuda.device_count():
        raise OptionError(
            f"--workers {workers}: this machine has {torch.cuda.device_count()} GPU(s), and each worker needs one"
        )


def _resolve_device(device: str) -> str:
    if device == "cuda" and not torch.cuda.is_available():
        raise OptionError(
            "--device cuda: torch finds no CUDA device here; use --device cpu, or install a CUDA build of torch"
        )
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def _resolve_dtype(dtype: str, device: str, stored: str) -> str:
    """Return the compute dtype's torch name; ``auto`` is that of the checkpoint."""
    if dtype != "auto":
        return dtype
    if stored == "F16" and device == "cpu":
        return "float32"  # float16 products are several times slower than float32 ones on CPUs
    return {"BF16": "bfloat16", "F16": "float16"}.get(stored, "float32")


def _main_dtype(checkpoint: Checkpoint) -> str:
    """Return the dtype of most of the checkpoint's bytes."""
    sizes: dict[str, int] = {}
    for entry in checkpoint.tensors.values():
        sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.size_bytes
    return max(sizes, key=lambda name: sizes[name], default="F32")


def _named_dtype(config: dict[str, Any]) -> str:
    """Return the dtype that config.json names, BF16 where it names none."""
    name = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    return {"float16": "F16", "float32": "F32", "float64": "F64"}.get(name, "BF16")
