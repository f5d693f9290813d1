"""The model of scaling: held against runs with one and two workers, and asked what 1 to 64 GPUs would do.

    python benchmarks/scaling.py measure --folder DIR [MODEL]
    python benchmarks/scaling.py tables

``measure`` prunes MODEL (default: SmolLM2-135M-Instruct, see ``examples/smollm2.py``) with one and with two workers and
writes predicted and measured seconds and moved bytes of a block to ``results/scaling.json``: medians over the blocks
but the first, which compiles. The prediction is that of ``billhook plan`` on this machine, the median of three before
the run and two after it, since a measurement of rates that takes a moment varies with what else goes on.
``tables`` writes the last section of ``docs/scaling.md``: those results, and predictions that need no weights.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from machine import this_machine

RESULTS = Path(__file__).parent / "results" / "scaling.json"
PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"
TITLE = "## Figures\n"
RUNS = [("wanda", "2:4"), ("sparsegpt", "unstructured")]
OPTIONS: dict[str, Any] = {"calibration": "random", "samples": 32, "seqlen": 512, "device": "cpu"}

GPUS = (1, 2, 4, 8, 16, 32, 64)
BANDWIDTH = "12GB/s"
MODELS = {
    "Llama 70B": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "num_hidden_layers": 80,
    },
    "Llama 405B": {
        "hidden_size": 16384,
        "intermediate_size": 53248,
        "num_attention_heads": 128,
        "num_key_value_heads": 8,
        "num_hidden_layers": 126,
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("measure")
    measuring.add_argument("--folder", type=Path, required=True, help="for outputs")
    measuring.add_argument("model", nargs="?", type=Path)
    commands.add_parser("tables")
    arguments = parser.parse_args()
    if arguments.command == "tables":
        write_tables()
    else:
        measure(arguments.model or _smollm2(), arguments.folder)


def _smollm2() -> Path:
    sys.path.append(str(Path(__file__).parents[1] / "examples"))
    from smollm2 import smollm2_folder

    return smollm2_folder()


def measure(model: Path, folder: Path) -> None:
    """Prune in every way and write the results."""
    results: dict[str, Any] = {"model": model.name, "options": OPTIONS, "machine": this_machine()}
    with tempfile.TemporaryDirectory(dir=folder) as own:
        for method, pattern in RUNS:
            for workers in (1, 2):
                name = f"{method} {pattern}, {workers} worker(s)"
                results[name] = run(model, Path(own) / "out", method=method, pattern=pattern, workers=workers)
                print(f"{name:40s} {results[name]}", flush=True)
                RESULTS.write_text(json.dumps(results, indent=1) + "\n")


def run(model: Path, output: Path, **options: Any) -> dict[str, Any]:
    """Predict, prune, and compare; ``options`` win over :data:`OPTIONS`."""
    from billhook.orchestrator import plan, prune

    options = OPTIONS | options
    shutil.rmtree(output, ignore_errors=True)
    plans = [plan(model, **options) for _ in range(3)]
    busy = os.getloadavg()[0]
    prune(model, output, **options)
    events = [json.loads(line) for line in (output / "billhook" / "events.jsonl").read_text().splitlines()]
    blocks = [event for event in events if event["event"] == "block"][1:]
    shutil.rmtree(output)
    plans += [plan(model, **options) for _ in range(2)]
    predicted = sorted((made.times[-1] for made in plans), key=lambda time: time.seconds)[2]
    seconds = statistics.median(block["seconds"] for block in blocks)
    return {
        "predicted_seconds": round(predicted.seconds, 3),
        "measured_seconds": round(seconds, 3),
        "measured_over_predicted": round(seconds / predicted.seconds, 2),
        "predicted_parts": {name: round(part, 3) for name, part in predicted.parts.items()},
        "measured_parts": {
            name: round(statistics.median(block["parts_seconds"][name] for block in blocks), 3)
            for name in blocks[0]["parts_seconds"]
        },
        "predicted_moved_bytes": predicted.moved_bytes,
        "measured_moved_bytes": statistics.median(block["moved_bytes"] for block in blocks),
        "busy": busy,
    }


def write_tables() -> None:
    """Replace the last section of the page by what was measured and what the model says of several GPUs."""
    head, title, _ = PAGE.read_text().partition(TITLE)
    PAGE.write_text(head + title + "\n" + "\n".join([*_measured(), *_predicted()]) + "\n")


def _measured() -> list[str]:
    results = json.loads(RESULTS.read_text())
    lines = [
        f"{results['model']} on {results['machine']['cores']} CPU cores, {results['options']['samples']} samples of "
        f"{results['options']['seqlen']} tokens, seconds and bytes moved of one block; *busy* is the number of "
        "processes that ran or waited for a core before the run began, which should be none:",
        "",
        "| run | predicted, s | measured, s | measured / predicted | predicted, MB | measured, MB | busy |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, run in results.items():
        if "measured_seconds" in run:
            figures = [f"{run[f'{kind}_seconds']:.2f}" for kind in ("predicted", "measured")]
            figures.append(f"{run['measured_over_predicted']:.2f}")
            figures += [f"{run[f'{kind}_moved_bytes'] / 1e6:.2f}" for kind in ("predicted", "measured")]
            lines.append("| " + " | ".join([name, *figures, f"{run['busy']:.0f}"]) + " |")
    return lines


def _predicted() -> list[str]:
    lines = ["", f"Seconds of one block on several H100, each on a node of its own with {BANDWIDTH}:"]
    for name, keys in MODELS.items():
        with tempfile.TemporaryDirectory() as folder:
            write_config(Path(folder), keys)
            for method, pattern in (("sparsegpt", "unstructured"), ("sparsegpt", "2:4"), ("wanda", "2:4")):
                lines += ["", f"**{name}, {method}, {pattern}**", "", *_table(Path(folder), method, pattern)]
    return lines


def write_config(folder: Path, keys: dict[str, Any]) -> None:
    """Write the configuration of a Llama of some shape: all that a plan needs."""
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16"}
    config |= {"vocab_size": 128256, "max_position_embeddings": 8192, "tie_word_embeddings": False, **keys}
    (folder / "config.json").write_text(json.dumps(config))


def _table(folder: Path, method: str, pattern: str) -> list[str]:
    from billhook.orchestrator.devices import supposition
    from billhook.orchestrator.planning import estimate, make_plan
    from billhook.orchestrator.recipe import read_options
    from billhook.orchestrator.request import make_request

    heads = ("GPUs", "block", "speed-up", "forward", "statistics", "factors", "solving", "moving", "files")
    lines = ["| " + " | ".join((*heads, "moved, GB", "run, h", "limit")) + " |", "|---:" * 11 + "|---|"]
    recipe, _ = read_options(None, {"method": method, "pattern": pattern, "device": "cuda"})
    request = make_request(folder, recipe, weights_needed=False, device_needed=False)
    alone = 0.0
    for workers in GPUS:
        _, resources = read_options(None, {"workers": workers})
        made = make_plan(request, resources, supposed=supposition("h100", BANDWIDTH))
        taken, time = estimate(made), made.times[0]
        seconds = time.seconds + made.arrangement.extra_seconds / len(made.times)
        alone = alone or seconds
        parts = [*time.parts.values(), time.files]
        figures = [f"{seconds:.1f}", f"{alone / seconds:.1f}", *(f"{part:.2f}" for part in parts)]
        figures += [f"{time.moved_bytes / 1e9:.1f}", f"{taken.seconds / 3600:.2f}", time.limit]
        lines.append("| " + " | ".join([str(workers), *figures]) + " |")
    return lines


if __name__ == "__main__":
    main()
