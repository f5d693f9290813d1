"""Exercise and measure the CUDA path on a machine with a GPU: tiers, memory, rates; or the same on a CPU.

    python benchmarks/gpu_check.py [--device cuda|cpu] [--folder DIR]

Holds Grams, thresholds and the column sweep against their references, and times the sweep beside a copy of as many
bytes. Prunes a synthetic
checkpoint with every way of keeping things and checks that all give the same bytes, that the GPU's measured peak is
within what was planned, and that verify finds nothing. Prints one JSON document.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from fractions import Fraction
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
    statistics_and_thresholds(device)
    return {"device": name, "rates": vars(rates), "sweeps": sweeps(device), "runs": runs}


def statistics_and_thresholds(device: str) -> None:
    """Check Grams against float64, and what is selected against what a CPU selects."""
    from billhook.kernels.gram import add_gram_, gram_reference
    from billhook.layerworkers.collective import Alone
    from billhook.layerworkers.patterns import Selector, Unstructured

    torch.manual_seed(0)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for columns in (97, 2049, 5000):
            x_TC = torch.randn(300, columns).to(dtype).to(device)
            gram_CC = torch.zeros(columns, columns, device=device)
            add_gram_(gram_CC, x_TC)
            expected_CC = gram_reference(x_TC)
            difference = float((gram_CC.double() - expected_CC).tril().abs().max() / expected_CC.abs().max())
            assert difference < 1e-5, f"Gram of {columns} channels in {dtype}: {difference:g} from the reference"
    score_RC = torch.randint(0, 1000, (1000, 128)).float()
    select = Selector(Unstructured(Fraction(1, 2)), False, Alone())
    assert torch.equal(select(score_RC.to(device)).cpu(), select(score_RC)), "other entries are chosen than on a CPU"


def sweeps(device: str) -> list[dict[str, Any]]:
    """Check and time the sweep of one block of columns of a linear of the shape's width."""
    from billhook.kernels.factor import upper_factor_reference
    from billhook.kernels.gram import gram_reference
    from billhook.kernels.sweep import sweep_groups, sweep_groups_reference, sweep_masked, sweep_masked_reference

    torch.manual_seed(0)
    rows, columns = SHAPES[device].intermediate, 128
    weight_RB, x_TB = torch.randn(rows, columns), torch.randn(4 * columns, columns)
    factor_BB = upper_factor_reference(gram_reference(x_TB)).to(device, torch.float32)
    weight_RB, prune_RB = weight_RB.to(device), (torch.rand(rows, columns) < 0.5).to(device)
    moved_bytes = 3 * 4 * weight_RB.numel()  # the weights twice, the errors once
    copied = weight_RB.new_empty(moved_bytes // 8)
    copying = seconds(copied.clone)
    found = []
    for name, fast, exact in (
        ("masked", lambda w, u: sweep_masked(w, u, prune_RB), lambda w, u: sweep_masked_reference(w, u, prune_RB)),
        ("2:4", lambda w, u: sweep_groups(w, u, 2, 4), lambda w, u: sweep_groups_reference(w, u, 2, 4)),
    ):
        swept, expected = weight_RB.clone(), weight_RB.double()
        fast(swept, factor_BB)
        exact(expected, factor_BB.double())
        alike = (swept == 0) == (expected == 0)
        assert alike.double().mean() > 1 - 1e-4, f"{name}: other entries are pruned than by the reference"
        same_R = alike.all(dim=1)  # where a tie was broken otherwise, the rest of the row differs, too
        difference = float((swept.double() - expected)[same_R].abs().max() / expected.abs().max())
        assert difference < 1e-5, f"{name}: {difference:g} from the reference"
        taken = seconds(lambda fast=fast: fast(weight_RB.clone(), factor_BB))
        found.append({"sweep": name, "rows": rows, "difference": difference, "seconds": taken, "copying": copying})
    return found


def seconds(work: Callable[[], object]) -> float:
    """Return the median time of one call, until the device has done it."""
    times = []
    for _ in range(12):
        begin = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return statistics.median(times[2:])


if __name__ == "__main__":
    main()
