"""How time and memory grow with samples, depth, width and sparsity.

    python benchmarks/growth.py --folder DIR [--rounds N]

Prunes synthetic checkpoints by SparseGPT, one quantity varied at a time, in turns. Seconds are of the block loop behind
its first block, which compiles; memory is the run's measured peak. The exponent is the slope of the least-squares line
through the logarithms, of the medians. Results go to ``benchmarks/results/growth.json``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from machine import this_machine
from memory import Shape, block_events, make

RESULTS = Path(__file__).parent / "results" / "growth.json"


@dataclass(frozen=True)
class Point:
    """One run."""

    hidden: int = 1024
    blocks: int = 6
    samples: int = 16
    sparsity: float = 0.5

    @property
    def shape(self) -> Shape:
        return Shape(self.hidden, self.hidden * 7 // 2, self.hidden // 64, self.hidden // 128, self.blocks)


BASE = Point()
AXES = {
    "samples": [replace(BASE, samples=samples) for samples in (8, 16, 32, 64)],
    "depth": [replace(BASE, blocks=1 + blocks) for blocks in (5, 10, 20)],
    "width": [replace(BASE, hidden=hidden, samples=4) for hidden in (512, 1024, 2048)],
    "sparsity": [replace(BASE, sparsity=sparsity) for sparsity in (0.3, 0.5, 0.7, 0.9)],
}
"""In ``depth``, the first block is not in the time."""


def value(axis: str, point: Point) -> float:
    """Return what is varied along an axis."""
    if axis == "depth":
        return point.blocks - 1
    return float(getattr(point, {"width": "hidden"}.get(axis, axis)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for checkpoints and outputs")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--axis", action="append", choices=list(AXES), help="default: all")
    arguments = parser.parse_args()
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    axes = arguments.axis or list(AXES)
    points = list(dict.fromkeys(point for axis in axes for point in AXES[axis]))
    runs: dict[Point, list[tuple[float, int]]] = {point: [] for point in points}
    for _ in range(arguments.rounds):
        for point in points:
            runs[point].append(run(point, arguments.folder))
            print(point, runs[point][-1], flush=True)
    for axis in axes:
        results[axis] = summary(axis, {value(axis, point): runs[point] for point in AXES[axis]})
        print(axis, results[axis], flush=True)
    results["machine"] = this_machine()
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


def run(point: Point, folder: Path) -> tuple[float, int]:
    """Return the seconds behind the first block and the peak bytes of one run."""
    model, output = folder / point.shape.name, folder / "out"
    if not (model / "model.safetensors.index.json").is_file():
        make(point.shape, model)
    shutil.rmtree(output, ignore_errors=True)
    command = [
        *(sys.executable, "-m", "billhook.orchestrator", "prune", str(model), "-o", str(output), "--json"),
        *("--method", "sparsegpt", "--sparsity", str(point.sparsity), "--calibration", "random"),
        *("--samples", str(point.samples), "--seqlen", "512"),
    ]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    blocks = block_events(output)
    shutil.rmtree(output)
    return blocks[-1]["time"] - blocks[0]["time"], json.loads(done.stdout)["peak_bytes"]["ram"]


def summary(axis: str, runs: dict[float, list[tuple[float, int]]]) -> dict[str, Any]:
    """Return medians by the value of what is varied, and the exponents that fit them."""
    seconds = {x: statistics.median(each[0] for each in own) for x, own in runs.items()}
    peaks = {x: statistics.median(each[1] for each in own) for x, own in runs.items()}
    return {
        "seconds": {f"{x:g}": round(y, 2) for x, y in seconds.items()},
        "peak_bytes": {f"{x:g}": int(y) for x, y in peaks.items()},
        "exponent_of_seconds": slope(seconds),
        "exponent_of_peak": slope(peaks),
    }


def slope(curve: dict[float, float]) -> float:
    """Return the exponent p of the power law ``c x^p`` that fits best."""
    return round(float(np.polyfit(np.log(list(curve)), np.log(list(curve.values())), 1)[0]), 3)


if __name__ == "__main__":
    main()
