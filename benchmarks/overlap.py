"""How well reading, computing and writing overlap: the block loop against computing alone and input/output alone.

    python benchmarks/overlap.py --folder DIR

Prunes a synthetic checkpoint from a cold page cache, for a little and for more computation per byte. *Computing alone*
is the same run with the source in the page cache and the output in memory (/dev/shm); *input/output alone* reads and
writes the same tensors, from a cold cache, one thread each way, with nothing else. Medians of ``--repeats``. Results go
to ``benchmarks/results/overlap.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from machine import this_machine
from memory import Shape, loop_seconds, make

RESULTS = Path(__file__).parent / "results" / "overlap.json"
SHAPE = Shape(2048, 7168, 16, 8, 12)
TOKENS = {"little": (2, 128), "more": (4, 512)}
"""Samples and tokens of each."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    model, output = arguments.folder / SHAPE.name, arguments.folder / "out"
    if not (model / "model.safetensors.index.json").is_file():
        make(SHAPE, model)

    from billhook.cluster.session import ray_session

    results: dict[str, Any] = {"machine": this_machine(), "shape": SHAPE.name}
    with ray_session(None, 2, 0, 96 << 20), tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
        for name, (samples, seqlen) in TOKENS.items():
            rounds = []
            for _ in range(arguments.repeats):
                evict(model)
                overlapped = block_loop_seconds(model, output, samples, seqlen)
                computing = block_loop_seconds(model, Path(memory) / "out", samples, seqlen)
                evict(model)
                moving = transfer_seconds(model, output)
                rounds.append((overlapped, computing, moving, overlapped / max(computing, moving)))
            loop, computing, moving, ratio = (statistics.median(each) for each in zip(*rounds, strict=True))
            results[f"{name} computation"] = {
                "samples": samples,
                "seqlen": seqlen,
                "block_loop_seconds": round(loop, 2),
                "computing_alone_seconds": round(computing, 2),
                "input_output_alone_seconds": round(moving, 2),
                "ratio_to_the_larger": round(ratio, 3),
            }
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
            print(name, results[f"{name} computation"], flush=True)


def evict(folder: Path) -> None:
    """Ask the system to forget the cached pages of the folder's files."""
    os.sync()
    for path in folder.rglob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def block_loop_seconds(model: Path, output: Path, samples: int, seqlen: int) -> float:
    """Prune; return the time from the first block's begin to the last block's commit."""
    from billhook.orchestrator import prune

    shutil.rmtree(output, ignore_errors=True)
    prune(model, output, method="wanda", pattern="2:4", calibration="random", samples=samples, seqlen=seqlen, workers=1)
    seconds = loop_seconds(output)
    shutil.rmtree(output)
    return seconds


def transfer_seconds(model: Path, output: Path) -> float:
    """Read every block's tensors and write them to files of the same size, and sync: nothing else."""
    from billhook.layerworkers.files import read_bytes, sync_file, write_bytes
    from billhook.orchestrator.checkpoint import open_checkpoint
    from billhook.orchestrator.output import create_shards

    shutil.rmtree(output, ignore_errors=True)
    output.mkdir()
    checkpoint = open_checkpoint(model)
    create_shards(output, checkpoint)
    entries = [entry for entry in checkpoint.tensors.values() if ".layers." in entry.name]
    begin = time.monotonic()
    with ThreadPoolExecutor(1) as writer:
        writes = [
            writer.submit(
                write_bytes,
                f"{output}/{Path(entry.path).name}.part",
                entry.start_bytes,
                read_bytes(entry.path, entry.start_bytes, entry.size_bytes),
            )
            for entry in entries
        ]
        for write in writes:
            write.result()
    for shard in checkpoint.shards:
        sync_file(str(output / f"{shard.name}.part"))
    seconds = time.monotonic() - begin
    shutil.rmtree(output)
    return seconds


if __name__ == "__main__":
    main()
