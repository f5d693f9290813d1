"""billhook beside its peers on the same work: seconds, memory and perplexity.

    python benchmarks/peers.py --calibration wikitext2-valid.txt --text wikitext2-raw-test.txt --peer-python PYTHON

SmolLM2-135M, 32 samples of 512 tokens, on all cores of this machine: billhook, the plain flow of `reference_flow.py`,
and llm-compressor, run by PYTHON, of an environment that has it (`make bench` makes one). All get the same tokens. They
take turns for ``--rounds`` rounds; each figure is a median. *work* is the time from the begin of the first block to the
finished checkpoint (of the plain flow, it includes embedding the samples; of llm-compressor, all of ``oneshot``, with
the preparation of samples and the tracing of the model); *whole* is that of the whole command. Memory is measured in a
run of its own, as the largest sum of
the proportional set sizes of all processes; of billhook's, with one worker, Ray's own processes are shown apart.
Perplexity is that of the first 32 windows of 1024 tokens of the text. Results go to ``benchmarks/results/peers.json``.
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
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
from machine import this_machine

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "peers.json"
RECIPES = {
    "sparsegpt 50 %": ("sparsegpt", "unstructured"),
    "sparsegpt 2:4": ("sparsegpt", "2:4"),
    "wanda 50 %": ("wanda", "unstructured"),
}
SAMPLES, SEQLEN = 32, 512
SAMPLING_SECONDS = 0.1
RAY_AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")


@dataclass(frozen=True)
class Work:
    model: Path
    calibration: str
    tokens: Path
    peer_python: str


@dataclass(frozen=True)
class Run:
    whole_seconds: float
    work_seconds: float
    peak_bytes: int
    """0 where memory was not measured."""
    peak_bytes_of_ray: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", required=True, help="WikiText-2 validation split, tokenised release")
    parser.add_argument("--text", required=True, help="WikiText-2 raw test split")
    parser.add_argument("--peer-python", required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--recipe", action="append", choices=list(RECIPES), help="default: all")
    arguments = parser.parse_args()

    from smollm2 import smollm2_folder

    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    results["machine"] = this_machine()
    results["versions"] = {name: version(name) for name in ("torch", "transformers", "ray")} | {
        "llmcompressor": _peer_version(arguments.peer_python)
    }
    with tempfile.TemporaryDirectory() as folder:
        work = Work(smollm2_folder(), arguments.calibration, Path(folder) / "tokens.json", arguments.peer_python)
        work.tokens.write_text(json.dumps(_tokens(work)))
        output = Path(folder) / "out"
        for recipe in arguments.recipe or RECIPES:
            method, pattern = RECIPES[recipe]
            rounds: dict[str, list[Run]] = {tool: [] for tool in TOOLS}
            for _ in range(arguments.rounds):
                for tool, command in TOOLS.items():
                    rounds[tool].append(_run(tool, command(work, output, method, pattern, 0), output, False))
                    print(recipe, tool, rounds[tool][-1], flush=True)
            rows = results.setdefault("rows", {}).setdefault(recipe, {})
            for tool, command in TOOLS.items():
                _run(tool, command(work, output, method, pattern, 0), output, False)
                perplexity = _perplexity(output, arguments.text)
                measured = _run(tool, command(work, output, method, pattern, 1), output, True)
                rows[tool] = {
                    "work_seconds": round(statistics.median(run.work_seconds for run in rounds[tool]), 1),
                    "whole_seconds": round(statistics.median(run.whole_seconds for run in rounds[tool]), 1),
                    "all_work_seconds": [round(run.work_seconds, 1) for run in rounds[tool]],
                    "peak_bytes": measured.peak_bytes,
                    "peak_bytes_of_ray": measured.peak_bytes_of_ray,
                    "perplexity": round(perplexity, 2),
                }
                print(recipe, tool, rows[tool], flush=True)
            for tool in TOOLS:
                for kind in ("work", "whole"):
                    ratios = [
                        getattr(own, f"{kind}_seconds") / getattr(other, f"{kind}_seconds")
                        for own, other in zip(rounds["billhook"], rounds[tool], strict=True)
                    ]
                    rows[tool][f"billhook_over_it_{kind}"] = round(statistics.median(ratios), 3)
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")


def _billhook(work: Work, output: Path, method: str, pattern: str, workers: int) -> list[str]:
    return [
        *(sys.executable, "-m", "billhook.orchestrator", "prune", str(work.model), "-o", str(output)),
        *("--method", method, "--pattern", pattern, "--calibration", work.calibration),
        *("--samples", str(SAMPLES), "--seqlen", str(SEQLEN)),
        *(("--workers", str(workers), "--threads", str(os.cpu_count())) if workers else ()),
    ]


def _reference(work: Work, output: Path, method: str, pattern: str, _workers: int) -> list[str]:
    return [sys.executable, str(HERE / "reference_flow.py"), *_peer_options(work, output, method, pattern)]


def _llmcompressor(work: Work, output: Path, method: str, pattern: str, _workers: int) -> list[str]:
    return [work.peer_python, str(HERE / "peer_llmcompressor.py"), *_peer_options(work, output, method, pattern)]


def _peer_options(work: Work, output: Path, method: str, pattern: str) -> list[str]:
    options = {"--model": work.model, "--tokens": work.tokens, "-o": output, "--method": method, "--pattern": pattern}
    return [str(each) for option in options.items() for each in option]


TOOLS: dict[str, Callable[[Work, Path, str, str, int], list[str]]] = {
    "billhook": _billhook,
    "reference flow": _reference,
    "llm-compressor": _llmcompressor,
}
"""The command of each: of billhook's, with that many workers, or with as many as it likes (0)."""


def _run(tool: str, command: list[str], output: Path, watch: bool) -> Run:
    shutil.rmtree(output, ignore_errors=True)
    begin = time.time()
    with tempfile.TemporaryFile("w+") as printed, tempfile.TemporaryFile("w+") as log:
        process = psutil.Popen(command, stdout=printed, stderr=log, text=True)
        peak, of_ray = _watch(process) if watch else (0, 0)
        code, end = process.wait(), time.time()
        printed.seek(0)
        log.seek(0)
        if code:
            raise SystemExit(f"{tool}: exit code {code}\n{log.read()[-4000:]}")
        seconds = _own_work_seconds(output) if tool == "billhook" else json.loads(printed.readlines()[-1])["seconds"]
    return Run(end - begin, seconds, peak, of_ray)


def _own_work_seconds(output: Path) -> float:
    events = map(json.loads, (output / "billhook/events.jsonl").read_text().splitlines())
    began: float = next(event["began"] for event in events if event["event"] == "block")
    return max(path.stat().st_ctime for path in output.iterdir()) - began


def _watch(process: psutil.Popen) -> tuple[int, int]:
    """Return the largest sum of the proportional set sizes, and what Ray's own processes had of it."""
    peak = (0, 0)
    while process.poll() is None:
        total = of_ray = 0
        for each in [process, *process.children(recursive=True)]:
            try:
                size, title = each.memory_full_info().pss, " ".join(each.cmdline()[:3])
                of_ray += size if "/ray/" in title or title.strip() in RAY_AGENTS else 0
                total += size
            except (psutil.NoSuchProcess, psutil.ZombieProcess):
                pass
        peak = max(peak, (total, of_ray))
        time.sleep(SAMPLING_SECONDS)
    return peak


def _tokens(work: Work) -> list[tuple[int, ...]]:
    """Return the calibration samples that billhook draws, for the others."""
    from transformers import AutoConfig

    from billhook.orchestrator.calibration import calibration_windows
    from billhook.orchestrator.recipe import Recipe

    recipe = Recipe(method="sparsegpt", calibration=work.calibration, samples=SAMPLES, seqlen=SEQLEN)
    return list(calibration_windows(recipe, work.model, AutoConfig.from_pretrained(work.model)).tokens)


def _perplexity(folder: Path, text: str) -> float:
    from billhook.orchestrator import evaluate

    return evaluate(folder, text, seqlen=1024, windows=32).perplexity


def _peer_version(python: str) -> str:
    code = "from importlib.metadata import version; print(version('llmcompressor'))"
    return subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    main()
