"""Planned and measured memory, and time, of whole runs on synthetic checkpoints of real shapes.

    python benchmarks/memory.py --folder DIR [--case NAME ...]

Each case is one ``billhook prune`` in a process of its own, from random tokens. The checkpoints are written to DIR (up
to 16 GB each) and kept for the next time. Results go to ``benchmarks/results/memory.json``, one entry per case.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from machine import this_machine

RESULTS = Path(__file__).parent / "results" / "memory.json"


@dataclass(frozen=True)
class Shape:
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    blocks: int
    vocab: int = 32000

    @property
    def name(self) -> str:
        return f"llama-{self.hidden}-{self.intermediate}-{self.blocks}"


@dataclass(frozen=True)
class Case:
    shape: Shape
    method: str
    pattern: str
    samples: int
    options: tuple[str, ...] = field(default=())


def small(blocks: int) -> Shape:
    return Shape(1024, 3584, 16, 8, blocks)


LLAMA_8B = Shape(4096, 14336, 32, 8, 32)
LLAMA_70B_TWO_BLOCKS = Shape(8192, 28672, 64, 8, 2)

CASES = {
    **{f"depth {blocks}": Case(small(blocks), "wanda", "2:4", 8) for blocks in (8, 32, 128)},
    "magnitude": Case(small(8), "magnitude", "unstructured", 8),
    "sparsegpt": Case(small(8), "sparsegpt", "unstructured", 32),
    "sparsegpt 2:4": Case(small(8), "sparsegpt", "2:4", 32),
    "sparsegpt one worker": Case(small(8), "sparsegpt", "unstructured", 32, ("--workers", "1")),
    "sparsegpt spill": Case(
        small(8), "sparsegpt", "unstructured", 32, ("--intermediates", "spill", "--statistics", "disk")
    ),
    "sparsegpt replay": Case(
        small(8), "sparsegpt", "unstructured", 32, ("--intermediates", "replay", "--activations", "disk")
    ),
    "admm": Case(small(8), "admm", "unstructured", 16),
    "wanda lockstep": Case(small(8), "wanda", "unstructured", 32, ("--fit", "lockstep")),
    "8B wanda in 3 GiB": Case(LLAMA_8B, "wanda", "2:4", 8, ("--ram", "3GiB")),
    "8B sparsegpt in 5 GiB": Case(LLAMA_8B, "sparsegpt", "unstructured", 8, ("--ram", "5GiB")),
    "70B wanda": Case(LLAMA_70B_TWO_BLOCKS, "wanda", "2:4", 4, ("--ram", "20GiB", "--workers", "1", "--threads", "2")),
    "70B sparsegpt": Case(
        LLAMA_70B_TWO_BLOCKS, "sparsegpt", "unstructured", 4, ("--ram", "20GiB", "--workers", "1", "--threads", "2")
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--case", action="append", choices=list(CASES), help="default: all")
    arguments = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for name in arguments.case or CASES:
        results[name] = run(CASES[name], arguments.folder)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        print(f"{name:24s} {results[name]}", flush=True)


def run(case: Case, folder: Path) -> dict[str, object]:
    model, output = folder / case.shape.name, folder / "out"
    if not (model / "model.safetensors.index.json").is_file():
        make(case.shape, model)
    shutil.rmtree(output, ignore_errors=True)
    command = [
        *(sys.executable, "-m", "billhook.orchestrator", "prune", str(model), "-o", str(output), "--json"),
        *("--method", case.method, "--pattern", case.pattern, "--calibration", "random"),
        *("--samples", str(case.samples), "--seqlen", "512", *case.options),
    ]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    document = json.loads(done.stdout)
    last, loop = block_events(output)[-1], loop_seconds(output)
    shutil.rmtree(output)
    planned, measured = document["planned_bytes"]["ram"], document["peak_bytes"]["ram"]
    return {
        "command": " ".join(["billhook", *command[3:]]).replace(str(folder), "DIR"),
        "planned_ram_bytes": planned,
        "measured_ram_bytes": measured,
        "planned_over_measured": round(planned / measured, 3),
        "budget_ram_bytes": document["budgets"]["ram"],
        "within_budget": measured <= document["budgets"]["ram"],
        "planned_disk_bytes": document["planned_bytes"]["disk"],
        "measured_disk_bytes": document["peak_bytes"]["disk"],
        "seconds": round(document["seconds"], 1),
        "block_loop_seconds": round(loop, 1),
        "last_block_seconds": round(last["seconds"], 2),
        "last_block_parts_seconds": {part: round(spent, 2) for part, spent in last["parts_seconds"].items()},
        "machine": this_machine(),
    }


def block_events(output: Path) -> list[dict[str, Any]]:
    """Return what a run noted of each block, when it was committed."""
    lines = (output / "billhook/events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == "block"]


def loop_seconds(output: Path) -> float:
    """Return the seconds from the begin of a run's first block to the commit of its last."""
    blocks = block_events(output)
    begin: float = blocks[0]["began"]
    end: float = blocks[-1]["time"]
    return end - begin


def make(shape: Shape, folder: Path) -> None:
    script = Path(__file__).parent / "make_checkpoint.py"
    subprocess.run(
        [
            *(sys.executable, str(script), "--architecture", "llama", "-o", str(folder)),
            *("--hidden", str(shape.hidden), "--intermediate", str(shape.intermediate)),
            *("--heads", str(shape.heads), "--kv-heads", str(shape.kv_heads)),
            *("--blocks", str(shape.blocks), "--vocab", str(shape.vocab)),
        ],
        check=True,
        stdout=subprocess.DEVNULL,
    )


if __name__ == "__main__":
    main()
