"""What it costs that a run can be resumed: syncs and kept inputs, at the plan's own cadence, on and off.

    python benchmarks/resume_cost.py --model DIR [--pairs 5] [--samples 32] [--seqlen 512]

Each pair prunes the model twice, in turns first and second: as it is, and with ``--keep-inputs never`` and ``fsync``
doing nothing in any process of the run. Compared are the times of the block loops, as ratios within each pair. Results
go to ``benchmarks/results/resume_cost.json``.
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

RESULTS = Path(__file__).parent / "results" / "resume_cost.json"

WITHOUT_SYNC = "import os\nos.fsync = lambda descriptor: None\n"
"""Imported by every Python process that finds it on its path under the name sitecustomize."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--method", default="sparsegpt")
    arguments = parser.parse_args()
    work = [f"--samples={arguments.samples}", f"--seqlen={arguments.seqlen}", f"--method={arguments.method}"]
    ratios, seconds = [], []
    with tempfile.TemporaryDirectory(dir=".") as folder:
        (Path(folder) / "sitecustomize.py").write_text(WITHOUT_SYNC)
        output = Path(folder) / "out"
        for pair in range(arguments.pairs):
            on, off = {}, {"PYTHONPATH": str(Path(folder).resolve())}
            took: dict[bool, float] = {}
            for resumable in (True, False) if pair % 2 == 0 else (False, True):
                options = [*work] if resumable else [*work, "--keep-inputs=never"]
                took[resumable] = block_loop_seconds(arguments.model, output, options, on if resumable else off)
            ratios.append(took[True] / took[False])
            seconds.append(took[True])
            print(f"pair {pair}: on {took[True]:.1f} s, off {took[False]:.1f} s, ratio {ratios[-1]:.4f}", flush=True)
    result = {
        "model": arguments.model.name,
        "options": work,
        "ratios": [round(ratio, 4) for ratio in ratios],
        "median_ratio": round(statistics.median(ratios), 4),
        "median_block_loop_seconds": round(statistics.median(seconds), 1),
        "machine": {"cores": os.cpu_count()},
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


def block_loop_seconds(model: Path, output: Path, options: list[str], environment: dict[str, str]) -> float:
    """Prune; return the time from the begin of the first block to the commit of the last."""
    command = [sys.executable, "-m", "billhook.orchestrator", "prune", str(model), "-o", str(output), *options]
    subprocess.run(
        [*command, "--calibration", "random"],
        check=True,
        capture_output=True,
        env={**os.environ, **environment},
    )
    lines = (output / "billhook/events.jsonl").read_text().splitlines()
    blocks = [event for event in map(json.loads, lines) if event["event"] == "block"]
    shutil.rmtree(output)
    begin: float = blocks[0]["began"]
    end: float = blocks[-1]["time"]
    return end - begin


if __name__ == "__main__":
    main()
