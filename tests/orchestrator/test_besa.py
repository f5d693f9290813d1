"""BESA: its budgets, and runs that follow it."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from safetensors.torch import load_file

from billhook.layerworkers.besa import Learning
from billhook.layerworkers.errors import BudgetError, OptionError, UnsupportedModelError
from billhook.layerworkers.scratch import BAND_BYTES
from billhook.orchestrator import InputError, allocate, prune, verify
from billhook.orchestrator.allocation import ALLOCATORS, Evidence, Matrix, to_budget
from billhook.orchestrator.calibration import Windows
from billhook.orchestrator.passing import Beside, Load, Trial, arranged_for
from billhook.orchestrator.phases import changing, learning_by_gradients
from billhook.orchestrator.placing import Arrangement
from billhook.orchestrator.recipe import read_options
from billhook.orchestrator.request import make_request

MATRICES = [
    Matrix(f"{block}.{rows}", rows, 33, step) for block in (0, 2, 3) for rows, step in ((8, 8), (20, 1), (12, 12))
]


def evidence_of(shares: Sequence[float], asked: list[tuple[Learning, int]]) -> Evidence:
    """Three linears in each of three blocks of four, of which the same is learnt in each block."""

    def unknown(*_: object) -> Any:
        raise AssertionError

    def learnt(learning: Learning, samples: int) -> list[float]:
        asked.append((learning, samples))
        return [*shares] * 3

    return Evidence(MATRICES, unknown, unknown, unknown, [0] * 3 + [2] * 3 + [3] * 3, unknown, unknown, learnt)


@pytest.mark.parametrize("sparsity", [Fraction(3, 10), Fraction(11, 20), Fraction(7, 10)])
def test_each_block_loses_what_is_asked(sparsity: Fraction) -> None:
    asked: list[tuple[Learning, int]] = []
    shares = [float(sparsity) + 0.04, float(sparsity) - 0.02, float(sparsity)]
    found = ALLOCATORS["besa"].sparsities(evidence_of(shares, asked), float(sparsity), ALLOCATORS["besa"].options())
    assert asked == [(Learning(float(sparsity), 1, 5.0, 0.3), 32)]
    removed = to_budget(found, MATRICES, sparsity)
    assert sum(removed) == int(sparsity * sum(matrix.size for matrix in MATRICES))
    for block in range(3):
        own = removed[3 * block : 3 * block + 3]
        assert abs(sum(own) - sparsity * 40 * 33) < 1.0
        assert [count % matrix.step for count, matrix in zip(own, MATRICES[:3], strict=True)] == [0, 0, 0]
        assert own[0] / MATRICES[0].size > own[2] / MATRICES[2].size > own[1] / MATRICES[1].size


def test_nothing_is_learnt_where_nothing_is_removed() -> None:
    asked: list[tuple[Learning, int]] = []
    found = ALLOCATORS["besa"].sparsities(evidence_of([0.5] * 3, asked), 0.0, ALLOCATORS["besa"].options())
    assert found == [0.0] * 9
    assert not asked


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "samples=0: expected at least 1"),
        ({"epochs": 0}, "epochs=0: expected at least 1"),
        ({"beta": -1.0}, r"beta=-1\.0: expected 0 or a positive number"),
        ({"rate": 0.0}, r"rate=0\.0: expected a positive number"),
        ({"rate": float("nan")}, "rate=nan: expected a positive number"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        ALLOCATORS["besa"].options(**options)


def options_of(text_file: Path) -> Any:
    return {
        **{"method": "wanda", "sparsity": 0.6, "calibration": str(text_file), "samples": 6, "seqlen": 32},
        **{"dtype": "float32", "allocation": "besa", "allocation_options": {"samples": 4, "epochs": 2}},
    }


def test_a_run_follows_what_was_learnt(llama: Path, text_file: Path, tmp_path: Path, ray_cluster: None) -> None:
    options = options_of(text_file)
    table = allocate(llama, tmp_path / "table.json", workers=2, **options)
    assert len({table.sparsity_of(name) for name in table.removed}) > 7, "linears differ"
    for block in range(3):
        own = [name for name in table.removed if f"layers.{block}." in name]
        share = Fraction(sum(table.removed[name] for name in own), sum(table.sizes[name] for name in own))
        assert share == pytest.approx(Fraction(6, 10), abs=2e-3)
    prune(llama, tmp_path / "out", workers=1, **options)
    zeros = {}
    for path in sorted((tmp_path / "out").glob("*.safetensors")):
        zeros |= {each: int((w == 0).sum()) for each, w in load_file(path).items() if each.endswith("_proj.weight")}
    assert zeros == table.removed, "as with two workers"
    assert verify(tmp_path / "out").ok


def test_what_gradients_and_two_streams_need_is_planned_with(llama: Path, text_file: Path) -> None:
    samples, tokens = 4000, 64
    states = 2 * samples * tokens * 64 * 4

    def arranged(count: int, ram: str, beside: Beside = learning_by_gradients) -> Arrangement:
        options = {**options_of(text_file), "seqlen": tokens, "ram": ram, "workers": 1}
        recipe, resources = read_options(None, options)
        trial = Trial(make_request(llama, recipe), resources, Windows(((1, 2),) * count, ""), Path("."))
        return arranged_for(trial, Load(2, beside, ""), [1])

    few, many = arranged(1, "100GiB"), arranged(samples, "100GiB")
    assert many.activations == "device"
    assert many.peak.ram - few.peak.ram >= states * (samples - 1) // samples - (8 << 20)
    assert few.peak.ram - arranged(1, "100GiB", changing).peak.ram > 3 * BAND_BYTES - (8 << 20), "masks and gradients"
    parked = arranged(samples, f"{(few.peak.ram >> 20) + 110}MiB")
    assert parked.activations == "disk"
    assert parked.peak.disk >= states


def test_what_cannot_be_learnt_of_is_refused(llama: Path, make_model: Any, text_file: Path, tmp_path: Path) -> None:
    options = options_of(text_file)
    with pytest.raises(
        BudgetError, match=r"--allocation besa: passes each block backward.* 4 samples in two streams.*samples=N.*--ram"
    ):
        allocate(llama, tmp_path / "table.json", ram="100MiB", **options)
    experts = make_model("mixtral", torch.float32, **FAMILIES["mixtral"])
    with pytest.raises(UnsupportedModelError, match=r"--allocation besa: .* is a mixture of experts"):
        allocate(experts, tmp_path / "table.json", **options)
    with pytest.raises(InputError, match=r"besa looks at calibration samples, which --method magnitude"):
        allocate(llama, tmp_path / "table.json", allocation="besa", method="magnitude")
    assert not list(tmp_path.iterdir())
