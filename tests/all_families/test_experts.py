"""Experts of several families, over several workers and however memory is used: the same bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from families import EXPERTS

from billhook.orchestrator import prune

pytestmark = pytest.mark.usefixtures("ray_cluster")

SMALL: dict[str, Any] = {"samples": 10, "seqlen": 32, "partition_rows": 16}


def contents(output: Path) -> dict[str, bytes]:
    files = {path.name: path.read_bytes() for path in output.iterdir() if path.is_file()}
    return {**files, "manifest": (output / "billhook" / "manifest.json").read_bytes()}


@pytest.mark.parametrize(
    ("family", "method", "pattern"),
    [
        ("qwen3_moe", "sparsegpt", "unstructured"),
        ("qwen3_moe", "wanda", "2:4"),
        ("deepseek_v3", "admm", "2:4"),
        ("gpt_oss", "sparsegpt", "2:4"),
        ("llama4_text", "sparsegpt", "unstructured"),
    ],
)
def test_the_bytes_are_the_same_however_the_work_is_shared_out(
    make_model: Any, text_file: Path, tmp_path: Path, family: str, method: str, pattern: str
) -> None:
    folder = make_model(family, **EXPERTS[family])
    options: dict[str, Any] = {"method": method, "pattern": pattern, "calibration": str(text_file), **SMALL}
    one = contents(prune(folder, tmp_path / "1", workers=1, **options).output)
    assert contents(prune(folder, tmp_path / "3", workers=3, **options).output) == one
    kept: dict[str, Any] = {"activations": "disk", "intermediates": "replay", "statistics": "disk"}
    assert contents(prune(folder, tmp_path / "2", workers=2, **kept, **options).output) == one
