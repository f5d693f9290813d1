"""How fast tensors come from a cold disk: one pread after the other, against several at a time.

    python benchmarks/reading.py FILE [--gib 1]

FILE: a large file, such as a shard. Its cached pages are given up before each reading. Prints the median of
``--repeats`` for each way, and writes ``benchmarks/results/reading.json``. Where DeepSpeed's asynchronous reader can be
built (extra ``deepspeed``, libaio and a C++ compiler), it is measured too.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from billhook.layerworkers import files

RESULTS = Path(__file__).parent / "results" / "reading.json"
TENSOR_BYTES = 64 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    size = min(int(arguments.gib * 2**30), arguments.file.stat().st_size) // TENSOR_BYTES * TENSOR_BYTES
    ways: dict[str, Callable[[], None]] = {
        f"{threads} at a time": lambda threads=threads: read_by(threads, arguments.file, size)
        for threads in (1, 2, 4, 8)
    }
    if (reader := deepspeed_reader()) is not None:
        ways["DeepSpeed AIO"] = lambda: reader(arguments.file, size)
    rates: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(arguments.repeats):
        for way, read in ways.items():
            forget(arguments.file)
            begin = time.perf_counter()
            read()
            rates[way].append(size / (time.perf_counter() - begin) / 1e9)
    medians = {way: round(statistics.median(each), 2) for way, each in rates.items()}
    RESULTS.write_text(json.dumps({"gigabytes_per_second": medians, "bytes": size}, indent=1) + "\n")
    print(medians)


def read_by(threads: int, path: Path, size: int) -> None:
    """Read the file as the workers do, tensor by tensor, with so many requests at a time."""
    files._readers = ThreadPoolExecutor(threads)
    for start in range(0, size, TENSOR_BYTES):
        files.read_bytes(str(path), start, TENSOR_BYTES)


def deepspeed_reader() -> Callable[[Path, int], None] | None:
    """Return a reader through DeepSpeed's asynchronous input/output, or None where it cannot be built."""
    try:
        import torch
        from deepspeed.ops.op_builder import AsyncIOBuilder
    except ImportError:
        return None
    builder = AsyncIOBuilder()
    if not builder.is_compatible():
        return None
    handle = builder.load().aio_handle(1 << 20, 32, False, True, 1)
    buffer = handle.new_cpu_locked_tensor(TENSOR_BYTES, torch.empty(0, dtype=torch.uint8))

    def read(path: Path, size: int) -> None:
        for start in range(0, size, TENSOR_BYTES):
            handle.sync_pread(buffer, str(path), start)

    return read


def forget(path: Path) -> None:
    """Give up the cached pages of a file."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


if __name__ == "__main__":
    main()
