"""Mixtures of experts: nothing destroyed, every fallback told, the same bytes however the work is shared out."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from families import EXPERTS
from safetensors.torch import load_file, save_file

from billhook.orchestrator import InputError, inspect, plan, prune, verify
from billhook.orchestrator.plan_page import plan_as_text

pytestmark = pytest.mark.usefixtures("ray_cluster")

SMALL: dict[str, Any] = {"samples": 10, "seqlen": 32, "partition_rows": 16}


def contents(output: Path) -> dict[str, bytes]:
    files = {path.name: path.read_bytes() for path in output.iterdir() if path.is_file()}
    return {**files, "manifest": (output / "billhook" / "manifest.json").read_bytes()}


def linears_of(output: Path) -> list[dict[str, Any]]:
    manifest = json.loads((output / "billhook" / "manifest.json").read_text())
    linears: list[dict[str, Any]] = manifest["linears"]
    return linears


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.fixture(scope="module")
def sparse_routing(make_model: Any) -> Path:
    """Two layers of 64 experts, of which a token is sent to two: 384 matrices."""
    folder: Path = make_model(
        "mixtral", num_hidden_layers=2, num_local_experts=64, num_experts_per_tok=2, intermediate_size=48
    )
    return folder


@pytest.mark.parametrize("method", ["sparsegpt", pytest.param("wanda", marks=pytest.mark.thorough)])
def test_no_expert_is_destroyed_because_few_tokens_reach_it(
    sparse_routing: Path, text_file: Path, tmp_path: Path, method: str
) -> None:
    out = prune(
        sparse_routing, tmp_path / "out", method=method, calibration=str(text_file), samples=1, seqlen=32, workers=1
    ).output
    assert verify(out).ok
    linears = linears_of(out)
    experts = [linear for linear in linears if "experts" in linear["name"]]
    assert len(experts) == 384
    for linear in experts:
        assert linear["removed"] == linear["shape"][0] * linear["shape"][1] // 2
        assert linear["fallback"] == "pool"  # 32 tokens are fewer than 64 channels, whoever gets them
    sent = {linear["name"].rsplit(".", 2)[0]: linear["tokens"] for linear in experts}
    assert sum(sent.values()) == 2 * 2 * 32
    assert min(sent.values()) == 0
    assert all(linear["tokens"] is None and not linear["fallback"] for linear in linears if linear not in experts)
    kept = [float((tensor != 0).float().mean()) for name, tensor in tensors_of(out).items() if "experts" in name]
    assert min(kept) > 0.45


def test_only_experts_with_too_few_tokens_fall_back(sparse_routing: Path, text_file: Path, tmp_path: Path) -> None:
    """With one token for 64 channels enough, those that none is sent to are left."""
    out = prune(
        sparse_routing, tmp_path / "out", calibration=str(text_file), samples=1, seqlen=32, workers=2,
        expert_tokens=1 / 64, expert_fallback="dense",
    ).output  # fmt: skip
    assert verify(out, against=sparse_routing).ok
    before, after = tensors_of(sparse_routing), tensors_of(out)
    experts = [linear for linear in linears_of(out) if "experts" in linear["name"]]
    starved = [linear for linear in experts if not linear["tokens"]]
    assert 0 < len(starved) < 384
    for linear in experts:
        assert linear["fallback"] == ("" if linear["tokens"] else "dense")
        assert (linear["pattern"] == "dense") == (linear in starved)
        assert torch.equal(before[linear["name"]], after[linear["name"]]) == (linear in starved)
    name = starved[0]["name"]
    path = next(path for path in out.glob("*.safetensors") if name in load_file(path))
    save_file({**load_file(path), name: before[name] + 1}, path, metadata={"format": "pt"})
    found = {problem.name: problem.reason for problem in verify(out, against=sparse_routing).problems}
    assert found[name] == "was not pruned, but differs from the source"


def test_the_bytes_are_the_same_however_the_work_is_shared_out(
    make_model: Any, text_file: Path, tmp_path: Path
) -> None:
    folder = make_model("qwen3_moe", **EXPERTS["qwen3_moe"])
    options: dict[str, Any] = {"method": "sparsegpt", "calibration": str(text_file), **SMALL}
    kept: dict[str, Any] = {"activations": "disk", "intermediates": "replay", "statistics": "disk"}
    made = plan(folder, workers=2, **options)
    output = prune(folder, tmp_path / "2", workers=2, **options).output
    events = [json.loads(line) for line in (output / "billhook" / "events.jsonl").read_text().splitlines()]
    measured = [event["moved_bytes"] for event in events if event["event"] == "block"]
    assert measured == pytest.approx([time.moved_bytes for time in made.times], rel=0.05)
    assert contents(prune(folder, tmp_path / "1", workers=1, **kept, **options).output) == contents(output)


@pytest.mark.thorough
def test_experts_can_be_fitted_to_all_tokens(make_model: Any, text_file: Path, tmp_path: Path) -> None:
    folder = make_model("qwen3_moe", **EXPERTS["qwen3_moe"])
    options: dict[str, Any] = {
        "method": "sparsegpt",
        "calibration": str(text_file),
        "route": "all",
        "workers": 1,
        **SMALL,
    }
    shared = {
        linear.group for linear in plan(folder, **options).request.linears[0] if linear.name.endswith("gate_proj")
    }
    assert len(shared) == 1  # one Gram matrix for all
    out = prune(folder, tmp_path / "out", **options).output
    assert verify(out).ok
    assert all(linear["tokens"] is None for linear in linears_of(out))
    llama4 = make_model("llama4_text", **EXPERTS["llama4_text"])
    with pytest.raises(InputError, match="--route all: Llama4ForCausalLM scales"):
        plan(llama4, **options)


@pytest.mark.thorough
def test_experts_that_are_stacked_transposed_keep_their_pattern_along_the_inputs(
    make_model: Any, text_file: Path, tmp_path: Path
) -> None:
    folder = make_model("gpt_oss", **EXPERTS["gpt_oss"])
    asked: dict[str, Any] = {"method": "sparsegpt", "pattern": "2:4", "calibration": str(text_file), **SMALL}
    out = prune(folder, tmp_path / "out", workers=1, **asked).output
    assert verify(out, against=folder).ok
    name = "model.layers.0.mlp.experts.down_proj"
    weight_EIO = tensors_of(out)[name]
    assert int((weight_EIO.reshape(4, -1, 4, weight_EIO.shape[2]) != 0).sum(2).max()) == 2
    assert {fact.name: fact.pattern for fact in inspect(out).tensors}[name] == "2:4 transposed"
    names = {linear["name"] for linear in linears_of(out)}
    assert {f"{name}[{number}]" for number in range(4)} <= names


def test_the_plan_tells_of_experts(sparse_routing: Path) -> None:
    made = plan(sparse_routing, method="sparsegpt", samples=4, seqlen=32)
    text = plan_as_text(made)
    assert "experts    64 in 2 block(s), each fitted to the tokens that are sent to it; with fewer than 1" in text
    assert "mlp.experts.*.w1 48x64" in text
    assert text.count("experts.*") < 10
    assert not any("gate" in linear.name for block in made.request.linears for linear in block)
    assert made.request.pattern.sparsity == Fraction(1, 2)


@pytest.mark.thorough
def test_a_budget_makes_experts_be_done_in_groups(sparse_routing: Path, text_file: Path) -> None:
    options: dict[str, Any] = {"method": "sparsegpt", "calibration": str(text_file), "workers": 1, **SMALL}
    whole = plan(sparse_routing, **options)
    assert {each.experts_at_once for each in whole.arrangement.placements} == {0}
    within = plan(sparse_routing, **options, vram=whole.arrangement.peak.device - (1 << 20))
    assert {each.experts_at_once for each in within.arrangement.placements} != {0}
    assert within.arrangement.peak.device < whole.arrangement.peak.device
