"""What ``make demo`` runs: prune SmolLM2-135M with SparseGPT to 50 %, verify it, and compare perplexities.

    python examples/demo.py [--text FILE] [--output FOLDER]

Without ``--text``, half of Python's own language reference calibrates and the other half evaluates.
"""

from __future__ import annotations

import argparse
import json
import pydoc_data.topics
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from smollm2 import smollm2_folder

SAMPLES, SEQLEN, WINDOWS = 32, 512, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="any English text of at least 300 kB; one half calibrates")
    parser.add_argument("--output", type=Path, default=Path("out") / "SmolLM2-135M-sparsegpt-50")
    arguments = parser.parse_args()

    say("1/4  a real model: SmolLM2-135M-Instruct, from the package index")
    model = smollm2_folder()
    print(f"     {model}")
    with tempfile.TemporaryDirectory() as scratch:
        calibration, evaluation = split_text(arguments.text, Path(scratch))
        say("2/4  prune it: SparseGPT, half of the weights of every linear, two workers")
        if (arguments.output / "billhook" / "lock").is_file():  # an output of ours: make it anew
            shutil.rmtree(arguments.output)
        pruned = billhook(
            "prune", model, "-o", arguments.output, "--method", "sparsegpt", "--sparsity", "0.5",
            "--calibration", calibration, "--samples", SAMPLES, "--seqlen", SEQLEN, "--workers", 2,
        )  # fmt: skip
        say("3/4  verify the checkpoint against its source")
        verified = billhook("verify", arguments.output)
        say("4/4  perplexity of text that it was not calibrated on")
        windows = ("--text", evaluation, "--seqlen", SEQLEN, "--windows", WINDOWS)
        dense, sparse = (billhook("eval", folder, *windows) for folder in (model, arguments.output))
    say("done")
    rows = [
        ("sparsity", f"{pruned['sparsity']:.4f} over {len(pruned['linears'])} linears"),
        ("verified", f"{verified['checked_tensors']} tensors, ok" if verified["ok"] else "NOT OK"),
        ("perplexity dense", f"{dense['perplexity']:.2f}"),
        ("perplexity pruned", f"{sparse['perplexity']:.2f}"),
        ("seconds to prune", f"{pruned['seconds']:.0f}"),
        ("peak memory", f"{pruned['peak_bytes']['ram'] / 2**30:.2f} GiB, all processes"),
        ("checkpoint", str(arguments.output.resolve())),
    ]
    print("\n".join(f"  {name:<18} {value}" for name, value in rows))
    print(f"""
Load it as you would load the original:

    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = AutoModelForCausalLM.from_pretrained("{arguments.output}", dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained("{arguments.output}")""")


def split_text(source: Path | None, scratch: Path) -> tuple[Path, Path]:
    """Write the two halves of a text to files: one to calibrate on, one to evaluate on."""
    if source is not None:
        text = source.read_text(encoding="utf-8")
    else:
        text = "\n\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    halves = scratch / "calibration.txt", scratch / "evaluation.txt"
    halves[0].write_text(text[: len(text) // 2], encoding="utf-8")
    halves[1].write_text(text[len(text) // 2 :], encoding="utf-8")
    return halves


def billhook(*arguments: object) -> dict[str, Any]:
    """Run a billhook command, its progress on the terminal; return its JSON document."""
    words = [str(argument) for argument in arguments]
    print(f"     $ billhook {shlex.join(words)}", flush=True)
    command = [sys.executable, "-m", "billhook.orchestrator", *words, "--json"]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if run.returncode:
        sys.exit(f"billhook {words[0]} ended with exit code {run.returncode}\n{run.stdout}")
    document: dict[str, Any] = json.loads(run.stdout)
    return document


def say(line: str) -> None:
    print(f"\n{line}", flush=True)


if __name__ == "__main__":
    main()
