"""One to four workers on a real model: the same bytes for every method and pattern, and how much sooner two are done.

    python benchmarks/workers.py --model DIR [--pairs 3] [--only bytes|time] [--recipe "sparsegpt 2:4" ...]

*bytes* prunes the model with every method, unstructured and 2:4, with 1, 2, 3 and 4 workers, and compares the hash of
every file. *time* compares the block loop of one and of two single-threaded workers, in turns, start-up excluded, and
measures start-up: from the command's begin to that of its first block. Results go to
``benchmarks/results/workers.json``.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import this_machine
from memory import loop_seconds

RESULTS = Path(__file__).parent / "results" / "workers.json"
RECIPES = list(itertools.product(["wanda", "sparsegpt", "admm"], ["unstructured", "2:4"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--only", choices=["bytes", "time"])
    parser.add_argument("--recipe", action="append", choices=[" ".join(recipe) for recipe in RECIPES])
    arguments = parser.parse_args()
    wanted = [recipe for recipe in RECIPES if " ".join(recipe) in (arguments.recipe or map(" ".join, RECIPES))]
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    results |= {"machine": this_machine(), "model": arguments.model.name}
    with tempfile.TemporaryDirectory() as folder:
        if arguments.only != "time":
            results.setdefault("sha256", {})
            for method, pattern in wanted:
                runs = (prune(arguments.model, Path(folder) / "out", method, pattern, n, 8, 128) for n in (1, 2, 3, 4))
                results["sha256"][f"{method} {pattern}"] = {str(n): run["sha256"] for n, run in enumerate(runs, 1)}
                write(results)
            alike = [len(set(hashes.values())) == 1 for hashes in results["sha256"].values()]
            results["same_bytes"] = all(alike)
            write(results)
        if arguments.only != "bytes":
            results.setdefault("time", {})
            for method, pattern in [recipe for recipe in wanted if recipe in RECIPES[:4]]:
                rounds = [
                    [prune(arguments.model, Path(folder) / "out", method, pattern, n, 32, 512) for n in (1, 2)]
                    for _ in range(arguments.pairs)
                ]
                results["time"][f"{method} {pattern}"] = {
                    "two_workers_over_one": [round(two["loop"] / one["loop"], 3) for one, two in rounds],
                    "median": round(statistics.median(two["loop"] / one["loop"] for one, two in rounds), 3),
                    "loop_seconds_of_one": round(statistics.median(one["loop"] for one, _ in rounds), 1),
                    "start_up_seconds_of_two": round(statistics.median(two["start_up"] for _, two in rounds), 1),
                }
                write(results)


def write(results: dict[str, Any]) -> None:
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps({key: value for key, value in results.items() if key != "sha256"}), flush=True)


def prune(model: Path, output: Path, method: str, pattern: str, workers: int, samples: int, seqlen: int) -> Any:
    """Return the hash of the output, the seconds of the block loop, and those before it."""
    shutil.rmtree(output, ignore_errors=True)
    begin = time.time()
    command = [
        *(sys.executable, "-m", "billhook.orchestrator", "prune", str(model), "-o", str(output), "--method", method),
        *("--pattern", pattern, "--calibration", "random", "--samples", str(samples), "--seqlen", str(seqlen)),
        *("--workers", str(workers), "--keep-inputs", "never"),
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    digest = hashlib.sha256()
    for path in sorted(path for path in output.iterdir() if path.is_file()):
        digest.update(path.name.encode() + path.read_bytes())
    digest.update((output / "billhook/manifest.json").read_bytes())
    events = map(json.loads, (output / "billhook/events.jsonl").read_text().splitlines())
    first = next(event["began"] for event in events if event["event"] == "block")
    return {"sha256": digest.hexdigest(), "loop": loop_seconds(output), "start_up": first - begin}


if __name__ == "__main__":
    main()
