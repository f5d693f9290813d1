from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from billhook.kernels.select import smallest_in_groups, smallest_in_rows
from billhook.orchestrator import InputError, inspect, inspection


@pytest.mark.parametrize("chunk_bytes", [100, 64 << 20])
def test_patterns_and_sparsity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int) -> None:
    monkeypatch.setattr(inspection, "CHUNK_BYTES", chunk_bytes)
    torch.manual_seed(0)
    w = torch.randn(64, 96)
    tensors = {f"{n}:{m}": w.masked_fill(smallest_in_groups(w.abs(), n, m), 0) for n, m in ((2, 4), (4, 8), (1, 4))}
    tensors |= {
        "dense": w,
        "unstructured": w.masked_fill(smallest_in_rows(w.abs(), 48), 0),
        "vector": torch.ones(7),
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 4),
        "whole": torch.arange(5),
    }
    save_file(tensors, tmp_path / "any.safetensors")
    facts = {fact.name: fact for fact in inspect(tmp_path / "any.safetensors").tensors}
    assert set(facts) == set(tensors) - {"whole", "empty"}
    for name in ("2:4", "4:8", "1:4", "dense", "unstructured"):
        assert facts[name].pattern == name
    assert facts["1:4"].sparsity == 0.75
    assert facts["scalar"].shape == ()
    found = inspect(tmp_path / "any.safetensors")
    assert found.sparsity == pytest.approx((0.5 + 0.5 + 0.75 + 0.5) / 4)


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"no")
    with pytest.raises(InputError, match="not a safetensors file"):
        inspect(tmp_path / "x.safetensors")
    with pytest.raises(InputError, match="neither"):
        inspect(tmp_path)


def test_blocks_kinds_and_sizes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    w = torch.randn(16, 32)
    half = w.masked_fill(smallest_in_groups(w.abs(), 2, 4), 0).bfloat16()
    tensors = {f"m.layers.{block}.mlp.up.weight": half.clone() for block in (2, 10)}
    tensors |= {
        "m.layers.10.experts.3.down.weight": w.masked_fill(w.abs() <= w.abs().flatten().kthvalue(384).values, 0)
    }
    tensors |= {"m.embed.weight": w, "m.layers.2.norm.weight": torch.ones(9), "m.layers.2.table": torch.arange(5)}
    save_file(tensors, tmp_path / "any.safetensors")
    found = inspect(tmp_path / "any.safetensors")
    assert [(block.name, block.tensors, block.sparsity) for block in found.blocks] == [
        ("m.layers.2", 1, 0.5),
        ("m.layers.10", 2, 0.625),
    ]
    assert found.blocks[1].patterns == ("2:4", "unstructured")
    assert [kind.name for kind in found.kinds] == ["m.layers.*.experts.*.down.weight", "m.layers.*.mlp.up.weight"]
    assert (found.kinds[1].tensors, found.kinds[1].zeros, found.kinds[1].elements) == (2, 512, 1024)
    facts = {fact.name: fact for fact in found.tensors}
    # 512 entries: 256 values of 2 bytes, and a bit for each entry; or the places of 256 values in 2 bits each.
    up = facts["m.layers.2.mlp.up.weight"]
    assert up.most_kept == {2: 2, 4: 2, 8: 4, 16: 8, 32: 16}
    assert up.sizes == inspection.Sizes(1024, 512 + 64, 512 + 64)
    assert facts["m.layers.10.experts.3.down.weight"].sizes == inspection.Sizes(2048, 128 * 4 + 64, 2048)
    assert facts["m.embed.weight"].sizes == inspection.Sizes(2048, 2048, 2048)
    assert facts["m.layers.2.norm.weight"].most_kept == {}
    rest = 2048 + 9 * 4 + 5 * 8
    assert found.sizes == inspection.Sizes(2 * 1024 + 2048 + rest, 2 * 576 + 576 + rest, 2 * 576 + 2048 + rest)


def test_eight_bit_floats_and_negative_zeros(tmp_path: Path) -> None:
    values = torch.tensor([[0.0, -0.0, 1.0, -2.0]] * 4)
    tensors = {"e4m3": values.to(torch.float8_e4m3fn), "e5m2": values.to(torch.float8_e5m2), "f16": values.half()}
    save_file(tensors, tmp_path / "any.safetensors")
    for fact in inspect(tmp_path / "any.safetensors").tensors:
        assert (fact.zeros, fact.pattern) == (8, "2:4")


def test_no_more_of_a_tensor_is_held_than_a_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspection, "CHUNK_BYTES", 1 << 20)
    save_file({"large": torch.zeros(4096, 1024)}, tmp_path / "any.safetensors")
    read: list[int] = []
    rows = inspection.read_rows
    monkeypatch.setattr(
        inspection, "read_rows", lambda entry, start, stop: read.append(stop - start) or rows(entry, start, stop)
    )
    assert inspect(tmp_path / "any.safetensors").sparsity == 1.0
    assert read == [256] * 16
