"""Every family with every pattern, end to end: the table in docs/families.md is written by this."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import EXPERTS, FAMILIES, IMAGES
from safetensors.torch import load_file

from billhook.layerworkers.collective import Alone
from billhook.layerworkers.tasks import Sample
from billhook.layerworkers.worker import BlockWorker
from billhook.orchestrator import prune, verify
from billhook.orchestrator.model import open_model

pytestmark = pytest.mark.usefixtures("ray_cluster")

TABLE = Path(__file__).parents[2] / "docs" / "families.md"
RECIPES = [(method, pattern) for method in ("wanda", "sparsegpt") for pattern in ("unstructured", "2:4")]
HEAD = """# Families

What `make test-families` did with a tiny random model of each: pruned it end to end, verified the output, loaded
it with transformers, and compared logits. It writes this table.

| model type | blocks of | """


@pytest.fixture(scope="module")
def table() -> Iterator[dict[str, dict[str, str]]]:
    rows: dict[str, dict[str, str]] = {}
    yield rows
    if set(rows) == set(FAMILIES) and all(len(row) == 1 + len(RECIPES) for row in rows.values()):
        names = [f"{method} {pattern}" for method, pattern in RECIPES]
        lines = [HEAD + " | ".join(names) + " |", "| --- " * (2 + len(names)) + "|"]
        lines += [
            f"| {family} | {rows[family]['blocks']} | " + " | ".join(rows[family][name] for name in names) + " |"
            for family in FAMILIES
        ]
        TABLE.write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def folders(make_model: Any) -> dict[str, Path]:
    return {
        family: make_model(family, torch.float32 if family in EXPERTS else torch.bfloat16, **overrides)
        for family, overrides in FAMILIES.items()
    }


@pytest.mark.parametrize(("method", "pattern"), RECIPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_pruned_end_to_end(
    folders: dict[str, Path],
    table: dict[str, dict[str, str]],
    text_file: Path,
    tmp_path: Path,
    family: str,
    method: str,
    pattern: str,
) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    row = table.setdefault(family, {})
    row[f"{method} {pattern}"] = "fails"
    source = folders[family]
    out = prune(
        source, tmp_path / "out", method=method, pattern=pattern, calibration=str(text_file), samples=8, seqlen=64,
        workers=1,
    ).output  # fmt: skip
    found = verify(out, against=source)
    assert found.ok, found.problems
    manifest = json.loads((out / "billhook" / "manifest.json").read_text())
    for linear in manifest["linears"]:
        assert linear["removed"] == linear["shape"][0] * linear["shape"][1] // 2, linear
    before, after = tensors_of(source), tensors_of(out)
    pruned = {linear["name"].partition("[")[0] for linear in manifest["linears"]}
    assert all(torch.equal(before[name], after[name]) for name in before.keys() - pruned)
    assert not any("embed" in name or "norm" in name or "bias" in name for name in pruned)
    auto = AutoModelForImageTextToText if family in IMAGES else AutoModelForCausalLM
    model = auto.from_pretrained(out)
    row["blocks"] = next(
        type(module[0]).__name__
        for module in model.get_decoder().modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == model.config.get_text_config().num_hidden_layers
    )
    opened = open_model(out, "cpu", "auto", False)
    worker = BlockWorker(opened.worker_setup(torch.get_num_threads()), Alone())
    window = torch.randint(0, 500, (1, 48), generator=torch.Generator().manual_seed(0))
    worker.start(opened.layout.stem, [Sample(0, tuple(window[0].tolist()))])
    for block in opened.layout.blocks:
        worker.forward_block(block.index, block.tensors)
    with torch.inference_mode():
        expected = model(window).logits
    # Of experts, transformers sums a token's in another order.
    tolerance = 1e-4 * float(expected.std()) if family in EXPERTS else 0.0
    assert torch.allclose(worker.logits(0), expected, rtol=0.0, atol=tolerance)
    row[f"{method} {pattern}"] = "pass"


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
