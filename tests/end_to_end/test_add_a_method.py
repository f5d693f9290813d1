"""The page that adds a method, done as it says, as a package of its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from billhook.orchestrator import verify

PAGE = Path(__file__).parents[2] / "docs/how-to/add-a-method.md"


@pytest.fixture
def installed(tmp_path: Path) -> dict[str, str]:
    """The environment in which the page's file is installed, by the entry point that the page shows."""
    text = PAGE.read_text()
    code, toml = re.search(r"```python\n(.*?)```", text, re.DOTALL), re.search(r"```toml\n(.*?)```", text, re.DOTALL)
    assert code is not None
    assert toml is not None
    name, value = re.search(r'^(\S+) = "(.*)"$', toml[1], re.MULTILINE).groups()  # type: ignore[union-attr]
    packages = tmp_path / "packages"
    info = packages / "wanda_layer-1.0.dist-info"
    info.mkdir(parents=True)
    (packages / f"{value.partition(':')[0]}.py").write_text(code[1])
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: wanda-layer\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[billhook.methods]\n{name} = {value}\n")
    return {**os.environ, "PYTHONPATH": f"{packages}:{os.environ.get('PYTHONPATH', '')}"}


def billhook(environment: dict[str, str], *arguments: object) -> str:
    command = [sys.executable, "-m", "billhook.orchestrator", *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_pages_method_prunes_a_model(
    installed: dict[str, str], llama: Path, text_file: Path, tmp_path: Path
) -> None:
    assert "wanda-layer" in {row["name"] for row in json.loads(billhook(installed, "methods", "--json"))}
    asked = ("--calibration", text_file, "--samples", 8, "--seqlen", 32, "--sparsity", 0.6, "--workers", 2)
    billhook(
        installed,
        "prune",
        llama,
        "-o",
        tmp_path / "out",
        "--method",
        "wanda-layer+refit",
        "--set",
        "exponent=0.5",
        *asked,
    )
    assert verify(tmp_path / "out").ok
    weights: dict[str, torch.Tensor] = {}
    for path in (tmp_path / "out").glob("*.safetensors"):
        weights |= load_file(path)
    weight = weights["model.layers.0.self_attn.q_proj.weight"]
    assert int((weight == 0).sum()) == int(0.6 * weight.numel())
    assert len({int(count) for count in (weight == 0).sum(dim=1)}) > 1, "rows are not compared by themselves"
