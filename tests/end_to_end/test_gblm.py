"""GBLM: a pass forward and back for gradients, and then the run, from beginning to end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from outputs import contents, tensors
from steps import ending_at, step_of

from billhook.orchestrator import InputError, Interrupted, plan, prune, verify
from billhook.orchestrator.gradients import GRADIENTS
from billhook.orchestrator.journal import FOLDER
from billhook.orchestrator.planning import estimate

pytestmark = pytest.mark.usefixtures("ray_cluster")

ASKED: dict[str, Any] = {
    **{"method": "gblm", "samples": 18, "seqlen": 32, "partition_rows": 32},
    "options": {"gradient_samples": 10, "alpha": 1e4},
}


@pytest.fixture(scope="module")
def whole(llama: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Path:
    output = tmp_path_factory.mktemp("gradients") / "whole"
    result = prune(llama, output, workers=1, calibration=str(text_file), **ASKED)
    assert verify(output).ok
    assert not (output / FOLDER / GRADIENTS).exists()
    weights = sum(linear.shape[0] * linear.shape[1] for linear in result.linears)
    size = sum(path.stat().st_size for path in llama.glob("*.safetensors"))
    assert size + 2 * weights < result.peak_bytes["disk"] <= result.planned_bytes["disk"]  # both in bfloat16
    assert all(linear.zeros >= linear.removed == linear.shape[0] * linear.shape[1] // 2 for linear in result.linears)
    return output


def test_gradients_decide_and_what_is_kept_stays_as_it_was(
    llama: Path, text_file: Path, whole: Path, tmp_path: Path
) -> None:
    asked = {**ASKED, "method": "wanda", "options": {}}
    prune(llama, tmp_path / "wanda", workers=1, calibration=str(text_file), **asked)
    dense, found, wanda = tensors(llama), tensors(whole), tensors(tmp_path / "wanda")
    pruned = [name for name in dense if not torch.equal(dense[name], found[name])]
    assert len(pruned) == 21
    for name in pruned:
        assert torch.equal(found[name][found[name] != 0], dense[name][found[name] != 0])
        assert not torch.equal(found[name], wanda[name])


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


def test_a_run_ended_in_the_pass_or_behind_it_ends_alike(
    llama: Path, text_file: Path, whole: Path, tmp_path: Path
) -> None:
    steps: list[tuple[str, int]] = []

    def run(*until: Any) -> None:
        given = {"workers": 2, "calibration": str(text_file), **ASKED}
        prune(llama, tmp_path / "out", **given, **ending_at(*until, lambda event: steps.append(step_of(event))))

    with pytest.raises(Interrupted, match="pass for gradients"):
        run("gradients", 4)
    with pytest.raises(Interrupted):
        run("prune", 1)
    assert ("gradients", 6) in steps
    steps.clear()
    run("", 0)
    assert not any(phase == "gradients" for phase, _ in steps), "what was found out is kept"
    assert contents(tmp_path / "out") == contents(whole)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        pytest.param("gpt2", {"pattern": "2:4", "dtype": "bfloat16"}, marks=pytest.mark.thorough),
        pytest.param("gemma2", {"fit": "lockstep", "methods": {r"mlp": "sparsegpt"}}, marks=pytest.mark.thorough),
        pytest.param("llama", {"method": "gblm+dsnot", "reconstruct": 1}, marks=pytest.mark.thorough),
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


def test_the_plan_counts_the_pass(llama: Path, text_file: Path) -> None:
    asked = {**ASKED, "calibration": str(text_file), "workers": 1}
    gblm, wanda = (plan(llama, **{**asked, **each}) for each in ({}, {"method": "wanda", "options": {}}))
    weights = sum(linear.shape[0] * linear.shape[1] for own in gblm.request.linears for linear in own)
    assert "gradients of the loss" in gblm.arrangement.phases
    assert estimate(gblm).bytes_written - estimate(wanda).bytes_written >= 2 * weights  # in bfloat16
    assert estimate(gblm).flops > 2 * estimate(wanda).flops
    few = plan(llama, **{**asked, "options": {"gradient_samples": 1}, "activations": "disk"})
    many = plan(llama, **{**asked, "options": {"gradient_samples": 18}, "activations": "disk"})
    blocks = len(many.request.model.layout.blocks)
    assert few.arrangement.peak.disk <= many.arrangement.peak.disk == (blocks + 2) * 18 * many.hidden_bytes


def test_experts_and_what_was_collected_are_refused(make_model: Any, text_file: Path, tmp_path: Path) -> None:
    model = make_model("mixtral", **FAMILIES["mixtral"])
    with pytest.raises(InputError, match=r"--method gblm: .* is a mixture of experts"):
        prune(model, tmp_path / "out", calibration=str(text_file), **ASKED)
    with pytest.raises(InputError, match=r"--method gblm: asks for gradients, which --collected has none of"):
        prune(model, tmp_path / "out", method="gblm", collected=str(tmp_path))
    assert not (tmp_path / "out").exists()
