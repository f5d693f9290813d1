"""Perplexity of SmolLM2-135M pruned by every method, beside the figures of the methods' own reference code.

    python benchmarks/fidelity.py --calibration wikitext2-valid.txt --text wikitext2-raw-test.txt

Protocol: 32 samples of 512 tokens of the calibration text (WikiText-2 validation, tokenised release), bfloat16, fitted
in lockstep; perplexity of the first 32 windows of 1024 tokens of the test text (WikiText-2 raw test). A row is the
median over the seeds of the calibration draw. A row that is more than 2 % worse than the reference is marked.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

RESULTS = Path(__file__).parent / "results" / "fidelity.json"


@dataclass(frozen=True)
class Row:
    method: str
    pattern: str
    sparsity: float | None
    reference: float
    reference_seconds: float | None


ROWS = (
    Row("magnitude", "unstructured", 0.5, 629.9, None),
    Row("wanda", "unstructured", 0.5, 51.35, 42),
    Row("sparsegpt", "unstructured", 0.5, 42.39, 86),
    Row("admm", "unstructured", 0.5, 37.48, None),
    Row("wanda", "2:4", None, 153.9, None),
    Row("sparsegpt", "2:4", None, 70.11, 111),
    Row("sparsegpt", "unstructured", 0.7, 161.1, 118),
    Row("admm", "unstructured", 0.7, 106.2, 215),
)
DENSE = 24.02


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", required=True, help="WikiText-2 validation split, tokenised release")
    parser.add_argument("--text", required=True, help="WikiText-2 raw test split")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", help="only the rows whose 'method pattern sparsity' contains this")
    arguments = parser.parse_args()

    from smollm2 import smollm2_folder

    from billhook.orchestrator import evaluate, prune

    model = smollm2_folder()

    def perplexity(folder: Path) -> float:
        return evaluate(folder, arguments.text, seqlen=1024, windows=32, workers=arguments.workers).perplexity

    dense = perplexity(model)
    print(f"dense {dense:.2f} (reference {DENSE})", flush=True)
    rows = []
    for row in ROWS:
        name = f"{row.method} {row.pattern} {row.sparsity or ''}".strip()
        if arguments.only and arguments.only not in name:
            continue
        figures, seconds = [], []
        for seed in range(arguments.seeds if row.method != "magnitude" else 1):
            with tempfile.TemporaryDirectory() as scratch:
                result = prune(
                    model,
                    Path(scratch) / "out",
                    method=row.method,
                    pattern=row.pattern,
                    sparsity=row.sparsity,
                    calibration=arguments.calibration,
                    samples=32,
                    seqlen=512,
                    seed=seed,
                    workers=arguments.workers,
                )
                figures.append(perplexity(result.output))
                seconds.append(result.seconds)
        median = statistics.median(figures)
        worse = median / row.reference - 1
        verdict = "WORSE" if worse > 0.02 else "ok"
        print(
            f"{name:28s} {median:8.2f}  reference {row.reference:7.2f}  {worse:+7.1%} {verdict}  "
            f"{statistics.median(seconds):5.1f} s  {[round(figure, 2) for figure in figures]}",
            flush=True,
        )
        rows.append({**asdict(row), "perplexity": median, "perplexities": figures, "worse": worse, "seconds": seconds})
    if not arguments.only:
        RESULTS.parent.mkdir(exist_ok=True)
        machine = {"processor": _processor(), "cores": os.cpu_count(), "python": platform.python_version()}
        document = {"command": " ".join(sys.argv), "machine": machine, "dense": dense, "rows": rows}
        RESULTS.write_text(json.dumps(document, indent=1) + "\n")


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
