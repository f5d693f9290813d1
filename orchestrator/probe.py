"""What this machine does in a second, from measurements that take less than one."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from billhook.layerworkers.files import read_bytes
from billhook.orchestrator.model import Model

READ_BYTES = 32 << 20
DISK_BYTES_PER_SECOND = 5e8
"""Assumed where there is no shard to read."""


LAUNCH_SECONDS = 5e-6
"""Of one kernel on a GPU, called from Python."""


@dataclass(frozen=True)
class Rates:
    """Per second."""

    flops: float
    """Of one worker, in the compute dtype."""
    float32_flops: float
    disk_bytes: float
    """Read; from the page cache where the checkpoint was just written."""
    copy_bytes: float
    """Between host and device; on a CPU within memory."""
    launch_seconds: float = 0.0
    """What one kernel takes however little it does."""


def measured_rates(model: Model) -> Rates:
    """Measure products in the model's dtype, a read of its largest shard, and a copy, on one thread."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        return Rates(
            _flops(getattr(torch, model.dtype), model.device),
            _flops(torch.float32, model.device),
            _disk_bytes(model),
            _copy_bytes(model.device),
            LAUNCH_SECONDS if model.device == "cuda" else 0.0,
        )
    finally:
        torch.set_num_threads(threads)
        if model.device == "cuda":
            torch.cuda.empty_cache()


def _flops(dtype: torch.dtype, device: str) -> float:
    size = 1024 if device == "cpu" else 8192
    a = torch.ones(size, size, device=device, dtype=dtype)
    return 2.0 * size**3 / _seconds(lambda: float((a @ a)[0, 0]))


def _disk_bytes(model: Model) -> float:
    shards = [shard for shard in model.checkpoint.shards if (model.checkpoint.folder / shard.name).is_file()]
    if not shards:
        return DISK_BYTES_PER_SECOND
    shard = max(shards, key=lambda each: each.size_bytes)
    path, size = str(model.checkpoint.folder / shard.name), min(shard.size_bytes, READ_BYTES)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, size, os.POSIX_FADV_DONTNEED)  # else the page cache would be measured
    finally:
        os.close(descriptor)
    begin = time.perf_counter()
    read_bytes(path, 0, size)
    return size / (time.perf_counter() - begin)


def _copy_bytes(device: str) -> float:
    a = torch.ones(32 << 20, dtype=torch.uint8)
    return a.numel() / _seconds(lambda: int(a.to(device, copy=True)[0]))


def _seconds(work: Callable[[], object]) -> float:
    """Return the time of the second and third run, whichever is less."""
    work()
    times = []
    for _ in range(2):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return min(times)
