"""Perplexity of SmolLM2-135M pruned by every method, beside the figures of the methods' own reference code.

    python benchmarks/fidelity.py --calibration wikitext2-valid.txt --text wikitext2-raw-test.txt

Protocol: 32 samples of 512 tokens of the calibration text (WikiText-2 validation, tokenised release), bfloat16, each
method's own --fit; perplexity, and KL divergence from the dense model in nats per token, of the first 32 windows of
1024 tokens of the test text (WikiText-2 raw test). Further texts, each with a --text of its own, are measured in the
same way. A row is the median over the seeds of the calibration draw. A row that is more than 2 % worse than the
reference is marked.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from machine import this_machine

from billhook.orchestrator.allocation import ALLOCATORS, UNIFORM

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

RESULTS = Path(__file__).parent / "results" / "fidelity.json"


@dataclass(frozen=True)
class Row:
    method: str
    pattern: str
    sparsity: float | None
    reference: float | None = None
    """Of the method's own published code; None where nobody has run it."""
    allocation: str = "uniform"
    correction: float | None = None
    """None: the method's own."""

    @property
    def name(self) -> str:
        allocated = "" if self.allocation == "uniform" else f" {self.allocation}"
        corrected = "" if self.correction is None else f" correction {self.correction}"
        return f"{self.method} {self.pattern} {self.sparsity or ''}".strip() + allocated + corrected


REFERENCES = (
    Row("magnitude", "unstructured", 0.5, 629.9),
    Row("wanda", "unstructured", 0.5, 51.35),
    Row("sparsegpt", "unstructured", 0.5, 42.39),
    Row("admm", "unstructured", 0.5, 37.48),
    Row("wanda", "2:4", None, 153.9),
    Row("sparsegpt", "2:4", None, 70.11),
    Row("sparsegpt", "unstructured", 0.7, 161.1),
    Row("admm", "unstructured", 0.7, 106.2),
)
DENSE = 24.02

METHODS = (
    *("auto", "wanda", "wanda-cumulative", "wanda++", "gblm", "ria", "sparsegpt"),
    *("sparsellm", "thanos", "net-trim", "iht", "admm", "alps"),
    *("wanda+dsnot", "wanda+swaps", "wanda+refit", "wanda+swaps+refit", "sparsegpt+refit", "admm+refit"),
)
PATTERNS = (("unstructured", 0.5), ("unstructured", 0.6), ("unstructured", 0.7), ("2:4", None))
CORRECTIONS = {"auto": (0.0, 0.25, 0.75, 1.0), "sparsegpt": (0.5,), "alps": (0.5,)}
"""Other shares than the methods' own: see docs/decisions/0009-auto.md."""
ROWS = (
    *REFERENCES,
    *(
        row
        for row in (Row(method, pattern, sparsity) for pattern, sparsity in PATTERNS for method in METHODS)
        if row.name not in {each.name for each in REFERENCES}
    ),
    *(
        Row(method, "unstructured", 0.7, None, allocation)
        for allocation in ALLOCATORS
        if allocation != UNIFORM
        for method in ("wanda", "sparsegpt")
    ),
    *(
        Row(method, "unstructured", sparsity, correction=correction)
        for method, corrections in CORRECTIONS.items()
        for sparsity in (0.5, 0.7)
        for correction in corrections
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", required=True, help="WikiText-2 validation split, tokenised release")
    parser.add_argument(
        "--text", required=True, action="append", help="WikiText-2 raw test split; may be repeated, with other texts"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--row", help="regex: only rows whose name it is found in")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="keep the figures that results/fidelity.json holds; rows of --row that lack a text, or KL, are redone",
    )
    arguments = parser.parse_args()

    from smollm2 import smollm2_folder

    from billhook.cluster.session import ray_session
    from billhook.orchestrator import evaluate, prune

    model = smollm2_folder()

    def measured(folder: Path, against: Path | None) -> dict[str, Any]:
        """Return the figures of the first text, and by their file names those of all."""
        by_text: dict[str, dict[str, float]] = {}
        for text in arguments.text:
            found = evaluate(folder, text, against=against, seqlen=1024, windows=32, workers=arguments.workers)
            figures = {"perplexity": found.perplexity}
            if found.against is not None:
                figures |= {"divergence": found.against.divergence, "agreement": found.against.agreement}
            by_text[Path(text).name] = figures
        return {**by_text[Path(arguments.text[0]).name], "texts": by_text}

    document = _previous() if arguments.resume else {}
    document |= {
        "command": "python benchmarks/fidelity.py --calibration wikitext2-valid.txt --text wikitext2-raw-test.txt",
        "machine": this_machine(),
    }
    figures: dict[str, dict[str, dict[str, Any]]] = document.setdefault("figures", {})
    texts = {Path(text).name for text in arguments.text}
    with ray_session(None, arguments.workers, 0, 256 << 20):
        if not texts <= document.get("dense_texts", {}).keys():
            dense = measured(model, None)
            document |= {"dense": dense["perplexity"], "dense_texts": dense["texts"]}
        print(f"dense {document['dense']:.2f} (reference {DENSE})", flush=True)
        for seed in range(arguments.seeds):
            for row in (row for row in ROWS if re.search(arguments.row or "", row.name)):
                done = figures.setdefault(row.name, {})
                if texts <= done.get(str(seed), {}).get("texts", {}).keys() or (row.method == "magnitude" and seed):
                    continue
                with tempfile.TemporaryDirectory() as scratch:
                    result = prune(
                        model,
                        Path(scratch) / "out",
                        method=row.method,
                        pattern=row.pattern,
                        sparsity=row.sparsity,
                        allocation=row.allocation,
                        **({} if row.correction is None else {"correction": row.correction}),
                        calibration=arguments.calibration,
                        samples=32,
                        seqlen=512,
                        seed=seed,
                        workers=arguments.workers,
                    )
                    done[str(seed)] = {**measured(result.output, model), "seconds": result.seconds}
                document["rows"] = [_summary(each, figures[each.name]) for each in ROWS if figures.get(each.name)]
                RESULTS.write_text(json.dumps(document, indent=1) + "\n")
                print(f"seed {seed}  {row.name:34s} {done[str(seed)]}", flush=True)
    for summary in document["rows"]:
        beside = ""
        if summary["reference"] is not None:
            worse = summary["worse"]
            beside = f"reference {summary['reference']:7.2f}  {worse:+7.1%} {'WORSE' if worse > 0.02 else 'ok'}"
        far = "" if summary.get("divergence") is None else f"KL {summary['divergence']:.4f}"
        took = f"{summary['seconds']:5.1f} s"
        print(f"{summary['name']:34s} {summary['perplexity']:8.2f}  {far:9s}  {took}  {beside}")


def _summary(row: Row, figures: dict[str, dict[str, Any]]) -> dict[str, object]:
    median = statistics.median(figure["perplexity"] for figure in figures.values())
    divergences = [figure["divergence"] for figure in figures.values() if "divergence" in figure]
    names = sorted({name for figure in figures.values() for name in figure.get("texts", {})})
    return {
        "name": row.name,
        "seeds": len(figures),
        "perplexity": median,
        "divergence": statistics.median(divergences) if divergences else None,
        "texts": {
            name: {
                key: statistics.median(
                    each["texts"][name][key] for each in figures.values() if name in each.get("texts", {})
                )
                for key in ("perplexity", "divergence", "agreement")
            }
            for name in names
        },
        "reference": row.reference,
        "worse": None if row.reference is None else median / row.reference - 1,
        "seconds": statistics.median(figure["seconds"] for figure in figures.values()),
    }


def _previous() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    return content


if __name__ == "__main__":
    main()
