"""Wanda++: gradients of each block, and rounds of pruning and tuning, through whole runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from outputs import contents, tensors
from steps import ending_at

from billhook.orchestrator import InputError, Interrupted, prune, verify

pytestmark = pytest.mark.usefixtures("ray_cluster")

ASKED: dict[str, Any] = {
    **{"method": "wanda++", "samples": 18, "seqlen": 32, "partition_rows": 32},
    "options": {"rounds": 2, "round_samples": 9, "rate": 1e-4, "alpha": 1.0},
}


@pytest.fixture(scope="module")
def whole(llama: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Path:
    output = tmp_path_factory.mktemp("regional") / "whole"
    result = prune(llama, output, workers=1, calibration=str(text_file), **ASKED)
    assert verify(output).ok
    assert all(linear.zeros >= linear.removed == linear.shape[0] * linear.shape[1] // 2 for linear in result.linears)
    return output


def test_rounds_move_what_is_kept_and_none_leave_it_alone(
    llama: Path, text_file: Path, whole: Path, tmp_path: Path
) -> None:
    still = {**ASKED, "options": {**ASKED["options"], "rounds": 0}}
    prune(llama, tmp_path / "still", workers=1, calibration=str(text_file), **still)
    dense, moved, kept = tensors(llama), tensors(whole), tensors(tmp_path / "still")
    pruned = [name for name in dense if not torch.equal(dense[name], moved[name])]
    assert len(pruned) == 21
    for name in pruned:
        assert torch.equal(kept[name][kept[name] != 0], dense[name][kept[name] != 0])
        share = (moved[name] == dense[name])[moved[name] != 0].float().mean()
        assert share < 0.9


@pytest.mark.parametrize(
    "way",
    [
        {"workers": 2, "activations": "disk", "statistics": "disk"},
        pytest.param({"workers": 3, "intermediates": "replay", "keep_inputs": 1}, marks=pytest.mark.thorough),
    ],
    ids=str,
)
def test_no_byte_depends_on_who_works_and_where_what_is_kept(
    llama: Path, text_file: Path, whole: Path, way: dict[str, Any], tmp_path: Path
) -> None:
    prune(llama, tmp_path / "out", calibration=str(text_file), **ASKED, **way)
    assert contents(tmp_path / "out") == contents(whole)


def test_a_run_that_is_gone_on_with_ends_alike(llama: Path, text_file: Path, whole: Path, tmp_path: Path) -> None:

    with pytest.raises(Interrupted):
        prune(
            *(llama, tmp_path / "out"),
            **ending_at("prune", 1),
            **{"workers": 2, "calibration": str(text_file), **ASKED},
        )
    prune(llama, tmp_path / "out", workers=1, calibration=str(text_file), **ASKED)
    assert contents(tmp_path / "out") == contents(whole)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("gpt2", {"pattern": "2:4"}),
        pytest.param("gemma2", {"fit": "lockstep", "methods": {r"mlp": "sparsegpt"}}, marks=pytest.mark.thorough),
        pytest.param("llama", {"reconstruct": 1, "method": "wanda+++dsnot"}, marks=pytest.mark.thorough),
    ],
    ids=str,
)
def test_it_goes_with_patterns_families_and_other_methods(
    make_model: Any, text_file: Path, family: str, options: dict[str, Any], tmp_path: Path
) -> None:
    model = make_model(family, **FAMILIES[family])
    for workers in (1, 2):
        asked = {**ASKED, **options, "calibration": str(text_file)}
        prune(model, tmp_path / f"of-{workers}", workers=workers, **asked)
    assert contents(tmp_path / "of-1") == contents(tmp_path / "of-2")
    assert verify(tmp_path / "of-1").ok


def test_experts_and_what_was_collected_are_refused(make_model: Any, text_file: Path, tmp_path: Path) -> None:
    model = make_model("mixtral", **FAMILIES["mixtral"])
    with pytest.raises(InputError, match=r"--method wanda\+\+: .* is a mixture of experts"):
        prune(model, tmp_path / "out", calibration=str(text_file), **ASKED)
    with pytest.raises(InputError, match=r"--method wanda\+\+: asks for gradients, which --collected"):
        prune(model, tmp_path / "out", method="wanda++", collected=str(tmp_path))
    assert not (tmp_path / "out").exists()
