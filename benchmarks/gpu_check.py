"""Exercise and measure the CUDA path on a machine with a GPU: tiers, memory, rates; or the same on a CPU.

    python benchmarks/gpu_check.py [--device cuda|cpu] [--folder DIR]

Prunes a synthetic checkpoint with every way of keeping things and checks that all give the same bytes, that the GPU's
measured peak is within what was planned, and that verify finds nothing. Prints one JSON document.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from memory import Shape, make

SHAPES = {"cuda": Shape(4096, 14336, 32, 8, 2), "cpu": Shape(256, 896, 4, 2, 2)}
WAYS: list[dict[str, Any]] = [
    {"activations": "device", "intermediates": "hold", "statistics": "device"},
    {"activations": "ram", "intermediates": "spill", "statistics": "ram"},
    {"activations": "disk", "intermediates": "replay", "statistics": "disk"},
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=list(SHAPES), default="cuda")
    parser.add_argument("--folder", type=Path, help="for the checkpoint; default: a temporary one")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("torch finds no CUDA device; --device cpu runs the same checks on a CPU")
    with tempfile.TemporaryDirectory() as temporary:
        print(json.dumps(check(arguments.device, arguments.folder or Path(temporary)), indent=1))


def check(device: str, folder: Path) -> dict[str, Any]:
    from billhook.orchestrator import plan, prune, verify

    shape = SHAPES[device]
    model = folder / shape.name
    if not (model / "model.safetensors.index.json").is_file():
        make(shape, model)
    options: dict[str, Any] = {"calibration": "random", "samples": 16, "seqlen": 512, "device": device, "workers": 1}
    runs = []
    for method, pattern in (("wanda", "2:4"), ("sparsegpt", "unstructured"), ("admm", "unstructured")):
        manifests = set()
        for way in WAYS:
            output = folder / "out"
            shutil.rmtree(output, ignore_errors=True)
            if method == "wanda" and way["intermediates"] == "spill":
                continue  # the dense block is fitted without a pause: nothing waits
            result = prune(model, output, method=method, pattern=pattern, **way, **options)
            manifests.add((output / "billhook/manifest.json").read_bytes())
            found = verify(output)
            assert found.ok, found.problems
            planned, measured = result.planned_bytes["vram"], result.peak_bytes["vram"]
            assert measured <= planned or device == "cpu", (
                f"{method} {way}: {measured} bytes on the GPU, {planned} planned"
            )
            runs.append(
                {
                    "method": method,
                    **way,
                    "seconds": round(result.seconds, 1),
                    "vram": measured,
                    "planned_vram": planned,
                }
            )
            shutil.rmtree(output)
        assert len(manifests) == 1, f"{method}: the bytes depend on where things are kept"
    rates = plan(model, method="magnitude", device=device).rates
    name = torch.cuda.get_device_name(0) if device == "cuda" else platform.processor()
    return {"device": name, "rates": vars(rates), "runs": runs}


if __name__ == "__main__":
    main()
