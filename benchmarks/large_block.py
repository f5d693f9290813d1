"""Two blocks of the shape of a 70B Llama: where the time of the second goes, and what 80 of them would take.

    python benchmarks/large_block.py --folder DIR

Prunes the checkpoint (3.6 GB, random weights) from 2048 tokens with a worker on each core, and holds the parts of the
second block's time against what its products take at the rate of a large one, measured in the same run. From these:
hours for the whole model from 128 samples of 2048 tokens, on this machine by the plan's time multiplied by what the
measured block took over its own prediction, and on GPUs by the plan's alone, with rates of data sheets. Results go to
``benchmarks/results/large_block.json``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import scaling
from machine import this_machine
from memory import LLAMA_70B_TWO_BLOCKS, make

RESULTS = Path(__file__).parent / "results" / "large_block.json"
SAMPLES, SEQLEN = 4, 512
WHOLE: dict[str, Any] = {"calibration": "random", "samples": 128, "seqlen": 2048}
GPUS = (1, 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for the checkpoint and outputs")
    folder = parser.parse_args().folder
    model = folder / LLAMA_70B_TWO_BLOCKS.name
    if not (model / "model.safetensors.index.json").is_file():
        make(LLAMA_70B_TWO_BLOCKS, model)
    results: dict[str, Any] = {"machine": this_machine(), "samples": SAMPLES, "seqlen": SEQLEN, "whole": WHOLE}
    for method, pattern in scaling.RUNS:
        name = f"{method} {pattern}"
        with tempfile.TemporaryDirectory(dir=folder) as own:
            block = scaling.run(
                *(model, Path(own) / "out"), method=method, pattern=pattern, workers=2, samples=SAMPLES, seqlen=SEQLEN
            )
        results[name] = block | {"hours": projected(method, pattern, block["measured_over_predicted"])}
        print(name, results[name], flush=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")


def projected(method: str, pattern: str, over_predicted: float) -> dict[str, float]:
    """Return the hours for 80 blocks, by machine."""
    from billhook.orchestrator.devices import supposition
    from billhook.orchestrator.planning import estimate, make_plan
    from billhook.orchestrator.recipe import read_options
    from billhook.orchestrator.request import make_request

    hours = {}
    with tempfile.TemporaryDirectory() as folder:
        scaling.write_config(Path(folder), scaling.MODELS["Llama 70B"])
        for device in ("cpu", "cuda"):
            recipe, _ = read_options(None, {"method": method, "pattern": pattern, "device": device, **WHOLE})
            request = make_request(Path(folder), recipe, weights_needed=False, device_needed=False)
            for workers in (2,) if device == "cpu" else GPUS:
                _, resources = read_options(None, {"workers": workers})
                supposed = supposition("h100", scaling.BANDWIDTH) if device == "cuda" else None
                plan = make_plan(request, resources, **({} if supposed is None else {"supposed": supposed}))
                seconds = estimate(plan).seconds * (over_predicted if device == "cpu" else 1.0)
                name = "this machine" if device == "cpu" else f"{workers} H100"
                hours[name] = round(seconds / 3600, 2)
    return hours


if __name__ == "__main__":
    main()
