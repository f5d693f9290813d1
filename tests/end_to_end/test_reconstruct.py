"""Blocks whose kept weights are tuned after their linears were solved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from outputs import contents, tensors
from steps import ending_at

from billhook.orchestrator import InputError, Interrupted, prune, verify
from billhook.orchestrator.events import BlockDone, Event

pytestmark = pytest.mark.usefixtures("ray_cluster")

CALIBRATION: dict[str, Any] = {"samples": 18, "seqlen": 32, "partition_rows": 32, "reconstruct": 2}
RATE = 0.01


@pytest.fixture(scope="module")
def blocks() -> list[BlockDone]:
    """Of the run ``whole``."""
    return []


@pytest.fixture(scope="module")
def whole(
    llama: Path, text_file: Path, blocks: list[BlockDone], tmp_path_factory: pytest.TempPathFactory, ray_cluster: None
) -> Path:
    output = tmp_path_factory.mktemp("reconstruct") / "whole"

    def note(event: Event) -> None:
        if isinstance(event, BlockDone):
            blocks.append(event)

    prune(llama, output, workers=1, calibration=str(text_file), progress=note, reconstruct_rate=RATE, **CALIBRATION)
    return output


def test_each_block_comes_nearer_to_the_dense_model(
    llama: Path, text_file: Path, whole: Path, blocks: list[BlockDone], tmp_path: Path
) -> None:
    found = [block.reconstruction for block in blocks]
    assert len(found) == 3
    assert all(each is not None and 0 < each.after < each.before for each in found)
    assert "tuned to" in str(blocks[0])
    plain = tmp_path / "plain"
    prune(llama, plain, workers=2, calibration=str(text_file), **{**CALIBRATION, "reconstruct": 0})
    tuned, solved = tensors(whole), tensors(plain)
    pruned = [linear.name for linear in blocks[0].linears]
    assert not any(torch.equal(tuned[name], solved[name]) for name in pruned)
    # The linears of the first block were solved alike, and what was removed stays so.
    assert all(torch.equal(tuned[name] == 0, solved[name] == 0) for name in pruned)
    assert verify(whole).ok


@pytest.mark.parametrize(
    "way",
    [
        {"workers": 2, "activations": "disk", "intermediates": "spill"},
        pytest.param({"workers": 3, "intermediates": "replay", "keep_inputs": 1}, marks=pytest.mark.thorough),
    ],
    ids=str,
)
def test_no_byte_depends_on_who_works_and_where_what_is_kept(
    llama: Path, text_file: Path, whole: Path, way: dict[str, Any], tmp_path: Path
) -> None:
    prune(llama, tmp_path / "out", calibration=str(text_file), reconstruct_rate=RATE, **CALIBRATION, **way)
    assert contents(tmp_path / "out") == contents(whole)


def test_a_run_that_is_gone_on_with_ends_alike(llama: Path, text_file: Path, whole: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {**CALIBRATION, "calibration": str(text_file), "reconstruct_rate": RATE}

    with pytest.raises(Interrupted):
        prune(llama, tmp_path / "out", **ending_at("prune", 1), workers=2, **options)
    prune(llama, tmp_path / "out", workers=1, **options)
    assert contents(tmp_path / "out") == contents(whole)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"method": "magnitude", "sparsity": 0.7}),
        pytest.param("gpt2", {"method": "wanda", "pattern": "2:4"}, marks=pytest.mark.thorough),
        pytest.param("gemma2", {"method": "sparsegpt"}, marks=pytest.mark.thorough),
        ("opt", {"method": "auto", "exclude": (r"layers\.1\.",)}),
    ],
    ids=str,
)
def test_any_method_is_tuned(
    make_model: Any, text_file: Path, family: str, options: dict[str, Any], tmp_path: Path
) -> None:
    model = make_model(family, **FAMILIES[family])
    seen: list[BlockDone] = []

    def note(event: Event) -> None:
        if isinstance(event, BlockDone):
            seen.append(event)

    asked = {**CALIBRATION, **options, "calibration": str(text_file), "reconstruct_rate": RATE}
    result = prune(model, tmp_path / "out", workers=2, progress=note, **asked)
    assert verify(tmp_path / "out").ok
    assert all(linear.zeros >= linear.removed > 0 for linear in result.linears)
    found = [(block.reconstruction, block.linears) for block in seen]
    assert all(each is not None and each.after <= each.before for each, _ in found)
    assert all(each is not None and each.after == each.before for each, linears in found if not linears)
    assert any(each is not None and each.after < each.before for each, _ in found)


@pytest.mark.thorough
def test_what_does_not_help_is_not_done(llama: Path, text_file: Path, tmp_path: Path) -> None:
    """With a rate that throws every weight away, the linears stay as they were solved."""
    asked: dict[str, Any] = {**CALIBRATION, "calibration": str(text_file), "method": "wanda", "workers": 2}
    prune(llama, tmp_path / "thrown", **{**asked, "reconstruct_rate": 0.9})
    prune(llama, tmp_path / "plain", **{**asked, "reconstruct": 0})
    thrown, plain = tensors(tmp_path / "thrown"), tensors(tmp_path / "plain")
    assert all(torch.equal(thrown[name], plain[name]) for name in plain)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reconstruct": -1}, "reconstruct: Input should be greater than or equal to 0"),
        ({"reconstruct_rate": 0.0}, "reconstruct_rate: Input should be greater than 0"),
        ({"reconstruct_rate": float("nan")}, "reconstruct_rate: Input should be"),
        ({"collected": "nowhere"}, "--collected: runs no samples, which --reconstruct 2 is about"),
    ],
    ids=str,
)
def test_bad_values_are_refused(
    llama: Path, text_file: Path, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        prune(llama, tmp_path / "out", **{**CALIBRATION, **options})
    assert not (tmp_path / "out").exists()


def test_a_mixture_of_experts_is_refused(make_model: Any, text_file: Path, tmp_path: Path) -> None:
    model = make_model("mixtral", **FAMILIES["mixtral"])
    with pytest.raises(InputError, match=r"--reconstruct 2: .* is a mixture of experts"):
        prune(model, tmp_path / "out", calibration=str(text_file), **CALIBRATION)
    assert not (tmp_path / "out").exists()
