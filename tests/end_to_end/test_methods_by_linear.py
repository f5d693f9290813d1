"""Linears of one model that are solved by different methods."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from billhook.orchestrator import InputError, plan, prune, verify
from billhook.orchestrator.planning import estimate

pytestmark = pytest.mark.usefixtures("ray_cluster")

CALIBRATION: dict[str, Any] = {"samples": 18, "seqlen": 32, "partition_rows": 32}


def contents(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in output.glob("*.safetensors")}


@pytest.mark.parametrize("correction", [0.5, pytest.param(0.0, marks=pytest.mark.thorough)])
def test_each_linear_is_solved_by_the_method_that_is_for_it(
    llama: Path, text_file: Path, tmp_path: Path, correction: float
) -> None:
    asked: dict[str, Any] = {
        **CALIBRATION,
        "calibration": str(text_file),
        "correction": correction,
        "fit": "lockstep",
        "method": "sparsegpt",
        "methods": {r"k_proj|down_proj": "wanda", r"layers\.1\..*o_proj": "admm+refit", "_proj$": "never matched"},
        "options": {"damping": 0.02, "iterations": 18},
    }
    asked["methods"].popitem()
    for workers in (1, 2):
        result = prune(llama, tmp_path / str(workers), workers=workers, **asked)
        moved = [
            event["moved_bytes"]
            for event in map(json.loads, (result.output / "billhook" / "events.jsonl").read_text().splitlines())
            if event["event"] == "block"
        ]
        assert sum(moved) == pytest.approx(estimate(plan(llama, workers=workers, **asked)).moved_bytes, rel=0.01)
        for linear in result.linears:
            name = linear.name
            expected = "wanda" if "k_proj" in name or "down_proj" in name else "sparsegpt"
            assert linear.method == ("admm+refit" if "layers.1" in name and "o_proj" in name else expected)
            assert linear.removed == linear.shape[0] * linear.shape[1] // 2
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    assert verify(tmp_path / "1").ok
    manifest = json.loads((tmp_path / "1" / "billhook" / "manifest.json").read_text())
    assert manifest["recipe"]["methods"][r"k_proj|down_proj"][0] == "wanda"
    assert manifest["recipe"]["methods"][r"layers\.1\..*o_proj"][1]["iterations"] == 18


def test_linears_beside_one_that_needs_no_samples_are_fitted(llama: Path, text_file: Path, tmp_path: Path) -> None:
    asked: dict[str, Any] = {**CALIBRATION, "calibration": str(text_file), "method": "magnitude"}
    mixed = prune(llama, tmp_path / "mixed", workers=1, methods={"v_proj": "wanda"}, fit="dense-block", **asked)
    by_method = {linear.method for linear in mixed.linears if "v_proj" in linear.name}
    assert by_method == {"wanda"}
    alone = prune(llama, tmp_path / "alone", workers=1, method="magnitude", include=("q_proj",))
    errors = {linear.name: linear.error for linear in mixed.linears}
    assert all(errors[linear.name] == linear.error for linear in alone.linears)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": {"nowhere": "wanda"}}, "--method-for nowhere: matches none"),
        ({"methods": {"(": "wanda"}}, r"--method-for \(: is not a regular expression"),
        ({"methods": {"q_proj": "wander"}}, "wander"),
        ({"methods": {"q_proj": "wanda+dsnot"}, "method": "sparsegpt"}, "ask for different statistics"),
        ({"methods": {"mlp": "magnitude"}, "method": "auto"}, "does not give what the method magnitude asks for"),
        ({"methods": {"mlp": "wanda"}, "method": "sparsegpt", "options": {"iterations": 3}}, "no such option"),
    ],
)
def test_methods_that_cannot_be_are_refused(llama: Path, text_file: Path, options: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        plan(llama, **{**CALIBRATION, "calibration": str(text_file), **options})
