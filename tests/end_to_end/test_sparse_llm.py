"""SparseLLM: feed-forward networks pruned in turns with what flows through them, through whole runs."""

from __future__ import annotations

import os
import subprocess
import sys
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
    **{"method": "sparsellm", "samples": 10, "seqlen": 32, "partition_rows": 32},
    "options": {"epochs": 2},
}


@pytest.fixture(scope="module")
def whole(llama: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Path:
    output = tmp_path_factory.mktemp("turns") / "whole"
    result = prune(llama, output, workers=1, calibration=str(text_file), **ASKED)
    assert verify(output).ok
    assert all(linear.zeros >= linear.removed == linear.shape[0] * linear.shape[1] // 2 for linear in result.linears)
    return output


def test_without_epochs_it_is_sparsegpt(llama: Path, text_file: Path, whole: Path, tmp_path: Path) -> None:
    for name, asked in (("none", {"options": {"epochs": 0}}), ("plain", {"method": "sparsegpt", "options": {}})):
        prune(llama, tmp_path / name, workers=1, calibration=str(text_file), **{**ASKED, **asked})
    none, plain, turns = (tensors(path) for path in (tmp_path / "none", tmp_path / "plain", whole))
    assert all(torch.equal(none[name], plain[name]) for name in plain)
    first = {name for name in plain if ".layers.0." in name and not torch.equal(plain[name], turns[name])}
    assert first == {f"model.layers.0.mlp.{kind}_proj.weight" for kind in ("gate", "up", "down")}


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


def test_a_run_that_is_gone_on_with_ends_alike(
    llama: Path, text_file: Path, whole: Path, tmp_path: Path, cluster_environment: dict[str, str]
) -> None:

    with pytest.raises(Interrupted):
        prune(
            *(llama, tmp_path / "out"),
            **ending_at("prune", 1),
            **{"workers": 2, "calibration": str(text_file), **ASKED},
        )
    command = [
        *(sys.executable, "-m", "billhook.orchestrator", "prune", "--resume", str(tmp_path / "out")),
        *("--workers", "1", "--json", "--address", cluster_environment["GCS"]),
    ]
    environment = {**os.environ, **cluster_environment}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out") == contents(whole)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("opt", {"pattern": "2:4"}),
        pytest.param("gpt2", {"fit": "dense-block"}, marks=pytest.mark.thorough),
        pytest.param("gemma2", {"methods": {r"self_attn": "admm"}}, marks=pytest.mark.thorough),
        pytest.param("llama", {"reconstruct": 1, "method": "sparsellm+refit"}, marks=pytest.mark.thorough),
    ],
    ids=str,
)
def test_it_goes_with_patterns_families_and_other_methods(
    make_model: Any, text_file: Path, family: str, options: dict[str, Any], tmp_path: Path
) -> None:
    model = make_model(family, **FAMILIES[family])
    prune(model, tmp_path / "out", workers=2, calibration=str(text_file), **{**ASKED, **options})
    assert verify(tmp_path / "out").ok


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("mixtral", {}, r"--method sparsellm: block 0 of .* has no feed-forward network .* use sparsegpt"),
        ("phi3", {}, r"--method sparsellm: block 0 of .* has no feed-forward network"),
        ("llama", {"exclude": ("up_proj",)}, "of which mlp.up_proj is not among its linears in block 0"),
        ("llama", {"methods": {"down_proj": "sparsegpt"}}, "of which mlp.down_proj is not among its linears"),
        ("llama", {"correction": 0.5}, "--correction 0.5: .* say --correction 0, or use sparsegpt"),
        ("llama", {"collected": "."}, "--method sparsellm: goes back to the samples"),
    ],
)
def test_what_it_is_not_for_is_refused(
    make_model: Any, text_file: Path, family: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model = make_model(family, **FAMILIES[family])
    given = {} if "collected" in options else {"calibration": str(text_file)}
    with pytest.raises(InputError, match=message):
        prune(model, tmp_path / "out", **{**ASKED, **given, **options})
    assert not (tmp_path / "out").exists()
