"""What it costs that a run can be resumed: syncs and kept inputs, at the plan's own cadence.

    python benchmarks/resume_cost.py --model DIR [--pairs 3] [--samples 8] [--seqlen 512]

Two figures. *share*: the time that all processes of a run spend in ``fsync`` and in writing kept inputs, summed as if
nothing of it overlapped, over the time of the block loop: an upper bound that other work on the machine hardly moves.
*ratios*: block loops of runs as they are over runs with ``--keep-inputs never`` and ``fsync`` doing nothing, in pairs,
in turns first and second. Results go to ``benchmarks/results/resume_cost.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from machine import this_machine
from memory import loop_seconds

RESULTS = Path(__file__).parent / "results" / "resume_cost.json"

WITHOUT_SYNC = "import os\nos.fsync = lambda descriptor: None\n"
"""Imported by every Python process that finds it on its path under the name sitecustomize."""

TIMED = """
import os, time
def timed(real, counts):
    def call(descriptor, *args):
        begin = time.monotonic()
        done = real(descriptor, *args)
        seconds = time.monotonic() - begin
        if counts(descriptor):
            with open(os.environ["TIMES"], "a") as file:
                file.write(f"{real.__name__} {seconds}\\n")
        return done
    return call
def kept(descriptor):
    return "/billhook/activations/" in os.readlink(f"/proc/self/fd/{descriptor}")
os.fsync = timed(os.fsync, lambda descriptor: True)
os.pwrite = timed(os.pwrite, kept)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seqlen", type=int, default=512)
    arguments = parser.parse_args()
    work = [f"--samples={arguments.samples}", f"--seqlen={arguments.seqlen}"]
    with tempfile.TemporaryDirectory(dir=".") as folder:
        output = Path(folder).resolve() / "out"
        result: dict[str, Any] = {"model": arguments.model.name, "options": work, "machine": this_machine()}
        result |= share(arguments.model, output, work)
        print(result, flush=True)
        ratios = []
        for pair in range(arguments.pairs):
            took: dict[bool, float] = {}
            for resumable in (True, False) if pair % 2 == 0 else (False, True):
                options = work if resumable else [*work, "--keep-inputs=never"]
                took[resumable] = block_loop_seconds(
                    arguments.model, output, options, "" if resumable else WITHOUT_SYNC
                )
            ratios.append(took[True] / took[False])
            print(f"pair {pair}: on {took[True]:.1f} s, off {took[False]:.1f} s, ratio {ratios[-1]:.4f}", flush=True)
        result["ratios"] = [round(ratio, 4) for ratio in ratios]
        result["median_ratio"] = round(statistics.median(ratios), 4) if ratios else None
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


def share(model: Path, output: Path, options: list[str]) -> dict[str, Any]:
    """Return the seconds spent in syncing and keeping, over all processes, and their share of the block loop."""
    loop = block_loop_seconds(model, output, options, TIMED)
    calls = [line.split() for line in (output.parent / "times").read_text().splitlines()]
    sums = {name: sum(float(seconds) for kind, seconds in calls if kind == name) for name in ("fsync", "pwrite")}
    return {
        "block_loop_seconds": round(loop, 2),
        "fsync_calls": sum(kind == "fsync" for kind, _ in calls),
        "fsync_seconds": round(sums["fsync"], 3),
        "keeping_seconds": round(sums["pwrite"], 3),
        "share": round(sum(sums.values()) / loop, 4),
    }


def block_loop_seconds(model: Path, output: Path, options: list[str], customisation: str) -> float:
    """Prune; return the time from the begin of the first block to the commit of the last."""
    command = [sys.executable, "-m", "billhook.orchestrator", "prune", str(model), "-o", str(output), *options]
    (output.parent / "sitecustomize.py").write_text(customisation)
    subprocess.run(
        [*command, "--calibration", "random"],
        check=True,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(output.parent), "TIMES": str(output.parent / "times")},
    )
    seconds = loop_seconds(output)
    shutil.rmtree(output)
    return seconds


if __name__ == "__main__":
    main()
