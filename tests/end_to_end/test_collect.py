"""Statistics that are collected once and solved on as often as one likes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from outputs import contents, tensors
from safetensors.torch import load_file
from steps import ending_at, step_of

from billhook.orchestrator import (
    InputError,
    Interrupted,
    allocate,
    collect,
    prune,
    report,
    resume,
    solve,
    status,
    verify,
)
from billhook.orchestrator.allocation.scores import collected_scores
from billhook.orchestrator.events import Event
from billhook.orchestrator.recipe import read_options
from billhook.orchestrator.request import make_request
from billhook.orchestrator.run_status import status_page

pytestmark = pytest.mark.usefixtures("ray_cluster")

CALIBRATION: dict[str, Any] = {"samples": 18, "seqlen": 32, "partition_rows": 32}


@pytest.fixture(scope="module")
def collected(llama: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Path:
    output = tmp_path_factory.mktemp("collect") / "statistics"
    collect(llama, output, workers=1, calibration=str(text_file), **CALIBRATION)
    return output


@pytest.mark.parametrize(
    "method",
    [
        "wanda",
        *(pytest.param(method, marks=pytest.mark.thorough) for method in ("sparsegpt", "wanda+dsnot", "admm+refit")),
    ],
    ids=["squares", "gram", "moments", "chain"],
)
def test_the_first_block_comes_out_as_if_the_samples_were_run(
    llama: Path, text_file: Path, collected: Path, method: str, tmp_path: Path
) -> None:
    """Its inputs are those of the dense model in a prune, too, where linears are fitted to the dense block."""
    solve(collected, tmp_path / "solved", method=method, workers=2, partition_rows=32)
    pruned = tmp_path / "pruned"
    prune(llama, pruned, method=method, fit="dense-block", workers=1, calibration=str(text_file), **CALIBRATION)
    ours, theirs = tensors(tmp_path / "solved"), tensors(pruned)
    first = [name for name in ours if ".layers.0." in name and "proj" in name]
    assert len(first) == 7
    assert all(torch.equal(ours[name], theirs[name]) for name in first)
    assert verify(tmp_path / "solved").ok


def test_a_diagonal_and_a_triangle_are_kept_of_each_input(collected: Path) -> None:
    """Names, sizes and meaning, as the card has them: others may read the files."""
    block = load_file(collected / "block-00000.safetensors")
    assert set(block) == {"self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"}
    for flat in block.values():
        columns = int((2 * len(flat) + 20.25) ** 0.5 - 4.5)
        triangle = columns * (columns + 1) // 2
        assert len(flat) == triangle + 4 * columns
        diagonal = flat[torch.arange(1, columns + 1).cumsum(0) - 1]
        squares, _, tokens, samples = flat[triangle:].view(4, -1)
        torch.testing.assert_close(diagonal, squares, rtol=1e-3, atol=1e-3)
        assert (tokens == 18 * 32).all()
        assert (samples == 18).all()


@pytest.mark.parametrize(
    "way",
    [
        {"workers": 2, "statistics": "disk", "activations": "disk"},
        pytest.param({"workers": 3, "intermediates": "replay"}, marks=pytest.mark.thorough),
    ],
    ids=str,
)
def test_no_byte_of_the_statistics_depends_on_who_works(
    llama: Path, text_file: Path, collected: Path, way: dict[str, Any], tmp_path: Path
) -> None:
    collect(llama, tmp_path / "out", calibration=str(text_file), **CALIBRATION, **way)
    assert contents(tmp_path / "out") == contents(collected)
    assert verify(tmp_path / "out").ok


def test_an_interrupted_collection_is_gone_on_with(
    llama: Path, text_file: Path, collected: Path, tmp_path: Path
) -> None:

    options: dict[str, Any] = {**CALIBRATION, "calibration": str(text_file), "keep_inputs": "never", "workers": 2}
    with pytest.raises(Interrupted):
        collect(llama, tmp_path / "out", **ending_at("prune", 1), **options)
    with pytest.raises(InputError, match="not complete; run the same 'billhook collect' again"):
        solve(tmp_path / "out", tmp_path / "solved", method="wanda")
    replayed: list[int] = []

    def note(event: Event) -> None:
        if step_of(event)[0] == "replay":
            replayed.append(step_of(event)[1])

    resume(tmp_path / "out", progress=note)
    assert replayed == [1, 2]
    assert contents(tmp_path / "out") == contents(collected)
    assert status(tmp_path / "out").state == "finished"
    assert "collects" in status_page(status(tmp_path / "out")).plain
    with pytest.raises(InputError, match="holds collected statistics, of which there is no report"):
        report(tmp_path / "out")


def test_what_passes_samples_through_changed_models_is_refused(collected: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"neuronal: passes samples through changed models, and --collected runs none"):
        solve(collected, tmp_path / "out", method="wanda", sparsity=0.6, allocation="neuronal")
    assert not (tmp_path / "out").exists()


def test_an_interrupted_solve_is_gone_on_with(collected: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"method": "admm", "sparsity": 0.6, "partition_rows": 32}
    solve(collected, tmp_path / "whole", workers=1, **options)

    with pytest.raises(Interrupted):
        solve(collected, tmp_path / "out", workers=2, **ending_at("prune", 1), **options)
    solve(collected, tmp_path / "out", workers=3, **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.thorough
def test_an_experts_tokens_and_fallback_hold_for_the_solve(make_model: Any, text_file: Path, tmp_path: Path) -> None:
    """Of an expert with too few tokens nothing is summed: it is pruned as the collection was asked to."""
    mixtral = make_model("mixtral", **FAMILIES["mixtral"])
    few: dict[str, Any] = {"samples": 2, "seqlen": 16, "expert_tokens": 0.4, "partition_rows": 32}
    for fallback in ("magnitude", "dense"):
        kept, solved, pruned = (tmp_path / f"{fallback}-{name}" for name in ("kept", "solved", "pruned"))
        collect(mixtral, kept, calibration=str(text_file), expert_fallback=fallback, workers=2, **few)
        solve(kept, solved, method="sparsegpt", workers=2, partition_rows=32)
        prune(
            *(mixtral, pruned),
            **few,
            method="sparsegpt",
            fit="dense-block",
            calibration=str(text_file),
            expert_fallback=fallback,
            workers=1,
        )
        ours, theirs = tensors(solved), tensors(pruned)
        first = [name for name in ours if ".layers.0." in name]
        assert all(torch.equal(ours[name], theirs[name]) for name in first)
        found = {
            json.dumps(each["fallback"])
            for each in json.loads((kept / "billhook/manifest.json").read_text())["linears"]
        }
        assert len(found) == 2, "some experts had enough tokens, and some had not"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"calibration": "random"}, "--collected: runs no samples, which --calibration random is about"),
        ({"correction": 0.5}, "--collected: runs no samples, which --correction 0.5 is about"),
        ({"fit": "lockstep"}, "--collected: runs no samples, which --fit lockstep is about"),
        ({"method": "collect"}, "--method collect: is a command of its own, 'billhook collect'"),
    ],
    ids=str,
)
def test_what_only_samples_can_tell_is_refused(
    collected: Path, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        solve(collected, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("key", ["method", "sparsity", "pattern", "allocation", "correction", "collected"])
def test_what_is_about_solving_is_not_collected(llama: Path, text_file: Path, key: str, tmp_path: Path) -> None:
    given: dict[str, Any] = {
        **{"method": "wanda", "sparsity": 0.6, "pattern": "2:4", "allocation": "erk", "correction": 0.5},
        "collected": str(tmp_path),
    }
    with pytest.raises(
        InputError, match=f"--{key}: is for solving; leave it out here, and give it to 'billhook solve'"
    ):
        collect(llama, tmp_path / "out", calibration=str(text_file), **{key: given[key]})
    assert not (tmp_path / "out").exists()


def test_statistics_of_another_model_or_of_fewer_linears_are_refused(
    llama: Path, make_model: Any, text_file: Path, collected: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="are those of another model"):
        solve(collected, tmp_path / "out", model=make_model(seed=7))
    with pytest.raises(InputError, match="holds no collected statistics; 'billhook collect MODEL"):
        solve(llama, tmp_path / "out")
    with pytest.raises(InputError, match="holds statistics, and this makes a checkpoint; choose another folder"):
        solve(collected, collected)
    collect(llama, tmp_path / "some", calibration=str(text_file), exclude=("mlp",), **CALIBRATION)
    with pytest.raises(InputError, match=r"layers.0.mlp.gate_proj.weight was left out when .*; --exclude it"):
        solve(tmp_path / "some", tmp_path / "out", method="wanda")
    assert not (tmp_path / "out").exists()
    solve(tmp_path / "some", tmp_path / "out", method="wanda", exclude=("mlp",))
    assert verify(tmp_path / "out").ok


@pytest.mark.thorough
def test_allocators_that_look_at_tokens_find_the_same_in_what_was_collected(
    llama: Path, text_file: Path, collected: Path, tmp_path: Path
) -> None:
    asked: dict[str, Any] = {"allocation": "owl", "method": "wanda", "sparsity": 0.7}
    seen = allocate(llama, tmp_path / "seen.json", calibration=str(text_file), workers=2, **CALIBRATION, **asked)
    found = allocate(llama, tmp_path / "found.json", collected=str(collected), **asked)
    assert found == seen
    assert len(set(found.removed.values())) > 3
    solved = solve(collected, tmp_path / "out", **asked)
    assert {linear.name: linear.removed for linear in solved.linears} == dict(found.removed)


def test_a_damaged_file_is_found(collected: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(collected, copy)
    path = copy / "block-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    assert [problem.name for problem in verify(copy).problems] == [path.name]
    path.write_bytes(data[:-100])
    with pytest.raises(InputError, match=r"block-00001.safetensors"):
        solve(copy, tmp_path / "out", method="wanda")


def test_several_workers_have_something_to_solve(llama: Path, collected: Path) -> None:
    recipe, _ = read_options(None, {"collected": str(collected), "partition_rows": 32})
    assert make_request(llama, recipe).useful_workers == 5  # 144 rows at most


def test_a_weight_that_is_no_number_has_no_score(llama: Path, collected: Path, tmp_path: Path) -> None:
    """The model is not read otherwise before its scores are looked at."""
    recipe, _ = read_options(None, {"collected": str(collected), "method": "wanda"})
    request = make_request(llama, recipe)
    block, linear = request.model.layout.blocks[0], request.linears[0][0]
    entry = next(tensor.entry for tensor in block.tensors if tensor.entry.name == linear.disk_name)
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"\xff" * entry.stop_bytes)  # all NaN in any float dtype
    assert request.collected is not None
    first = block.groups[linear.group].linears[0]
    weights = {linear.disk_name: replace(entry, path=str(bad))}
    with pytest.raises(InputError, match=f"tensor {linear.disk_name} holds NaN or infinity"):
        collected_scores(request.collected.entries[0], weights, {linear: first}, 5.0)
