"""Linears whose targets take back what a dense stream tells of the error before them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from outputs import contents, tensors
from steps import ending_at, step_of

from billhook.orchestrator import Interrupted, prune, verify
from billhook.orchestrator.events import Event

pytestmark = pytest.mark.usefixtures("ray_cluster")

CALIBRATION: dict[str, Any] = {"samples": 18, "seqlen": 32, "partition_rows": 32, "method": "auto"}


@pytest.fixture(scope="module")
def whole(llama: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Path:
    output = tmp_path_factory.mktemp("correction") / "whole"
    prune(llama, output, workers=1, calibration=str(text_file), **CALIBRATION)
    return output


@pytest.mark.parametrize(
    "way",
    [
        {"workers": 2, "intermediates": "spill", "activations": "disk", "statistics": "disk"},
        pytest.param({"workers": 3, "intermediates": "replay", "activations": "disk"}, marks=pytest.mark.thorough),
        pytest.param({"workers": 2, "keep_inputs": 1}, marks=pytest.mark.thorough),
    ],
    ids=str,
)
def test_no_byte_depends_on_who_works_and_where_what_is_kept(
    llama: Path, text_file: Path, whole: Path, way: dict[str, Any], tmp_path: Path
) -> None:
    prune(llama, tmp_path / "out", calibration=str(text_file), **CALIBRATION, **way)
    assert contents(tmp_path / "out") == contents(whole)
    assert verify(tmp_path / "out").ok


@pytest.mark.parametrize(
    ("keep_inputs", "replayed"), [(1, []), pytest.param("never", [1, 2], marks=pytest.mark.thorough)]
)
def test_a_run_that_is_gone_on_with_carries_both_streams_there(
    llama: Path, text_file: Path, whole: Path, keep_inputs: Any, replayed: list[int], tmp_path: Path
) -> None:
    options: dict[str, Any] = {**CALIBRATION, "calibration": str(text_file), "keep_inputs": keep_inputs}
    seen: list[int] = []

    def note(event: Event) -> None:
        if step_of(event)[0] == "replay":
            seen.append(step_of(event)[1])

    with pytest.raises(Interrupted):
        prune(llama, tmp_path / "out", **ending_at("prune", 1), workers=1, **options)
    prune(llama, tmp_path / "out", progress=note, workers=2, **options)
    assert seen == replayed
    assert contents(tmp_path / "out") == contents(whole)


@pytest.mark.thorough
def test_a_branch_may_begin_to_correct(llama: Path, text_file: Path, tmp_path: Path) -> None:
    """What an uncorrected run has kept is of one stream only: it is replayed instead."""
    options: dict[str, Any] = {**CALIBRATION, "calibration": str(text_file), "workers": 1, "keep_inputs": 1}
    prune(llama, tmp_path / "out", **{**options, "correction": 0.0})
    result = prune(llama, tmp_path / "out", from_block=2, **options)
    prune(llama, tmp_path / "plain", **{**options, "correction": 0.0})
    plain, branched = tensors(tmp_path / "plain"), tensors(result.output)
    differing = {name for name in plain if not torch.equal(plain[name], branched[name])}
    assert differing == {linear.name for linear in result.linears if ".layers.2." in linear.name}


@pytest.mark.parametrize(
    "family", ["qwen2_moe", *(pytest.param(name, marks=pytest.mark.thorough) for name in ("gpt2", "gemma2"))]
)
def test_families_of_all_kinds_are_corrected(make_model: Any, family: str, text_file: Path, tmp_path: Path) -> None:
    model = make_model(family, **FAMILIES[family])
    asked = {**CALIBRATION, "calibration": str(text_file), "workers": 2, "samples": 10}
    corrected = prune(model, tmp_path / "corrected", **asked)
    plain = prune(model, tmp_path / "plain", **{**asked, "correction": 0.0})
    assert verify(corrected.output).ok
    one, other = tensors(corrected.output), tensors(plain.output)
    same = {name for name in one if torch.equal(one[name], other[name])}
    own = {linear.name for linear in corrected.linears}
    # Of the first block, what is not yet preceded by anything sparse has nothing to take back.
    assert 0 < len(own - same) <= len(own)
    assert all(linear.zeros >= linear.removed for linear in corrected.linears)
