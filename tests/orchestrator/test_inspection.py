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
