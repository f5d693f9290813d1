from __future__ import annotations

from pathlib import Path

import pytest
import torch

from billhook.orchestrator import InputError, plan
from billhook.orchestrator.checkpoint import open_checkpoint, resolve_model
from billhook.orchestrator.model import resolve_workers


def test_a_hub_id_that_cannot_be_had_is_an_input_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        InputError, match=r"nobody/no-such-model: no such folder, and the Hugging Face hub gave no model"
    ):
        resolve_model("nobody/no-such-model")
    with pytest.raises(InputError, match="no such folder; expected"):
        resolve_model("./nothing/here")


def test_the_source_hash_notices_a_swapped_shard(llama: Path, tmp_path: Path) -> None:
    import shutil

    copy = Path(shutil.copytree(llama, tmp_path / "copy"))
    assert open_checkpoint(copy).source().sha256 == open_checkpoint(llama).source().sha256
    shard = sorted(copy.glob("*.safetensors"))[0]
    data = bytearray(shard.read_bytes())
    data[-2000:] = bytes(2000)
    shard.write_bytes(data)
    assert open_checkpoint(copy).source().sha256 != open_checkpoint(llama).source().sha256


def test_auto_workers_are_no_more_than_are_useful() -> None:
    assert resolve_workers("auto", "cpu", 1, 1) == 1
    assert resolve_workers("auto", "cpu", 10_000, 5) == 1
    assert resolve_workers(7, "cpu", 1, 1) == 7


def test_float16_is_computed_in_float32_on_a_cpu(make_model: object, tmp_path: Path) -> None:
    folder = make_model(dtype=torch.float16)  # type: ignore[operator]
    assert plan(folder, method="magnitude", device="cpu").request.model.dtype == "float32"
    assert plan(folder, method="magnitude", device="cpu", dtype="bfloat16").request.model.dtype == "bfloat16"


def test_linears_with_one_input_form_a_group(llama: Path) -> None:
    block = plan(llama, method="magnitude").request.model.layout.blocks[0]
    assert [(linear.name, linear.group) for linear in block.linears] == [
        ("self_attn.q_proj", 0),
        ("self_attn.k_proj", 0),
        ("self_attn.v_proj", 0),
        ("self_attn.o_proj", 1),
        ("mlp.gate_proj", 2),
        ("mlp.up_proj", 2),
        ("mlp.down_proj", 3),
    ]
