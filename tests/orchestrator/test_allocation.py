"""Allocations: exact budgets, the formulas of the allocators, files, and a run that follows one."""

from __future__ import annotations

import json
from array import array
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from steps import step_of

from billhook.layerworkers.observing import ScoreFacts, score_facts, score_total
from billhook.orchestrator import InputError, allocate, prune, verify
from billhook.orchestrator.allocation import (
    ALLOCATORS,
    Evidence,
    Matrix,
    read_allocation,
    to_budget,
    write_allocation,
)
from billhook.orchestrator.allocation.alphapruning import from_exponents, tail_exponent
from billhook.orchestrator.allocation.magnitudes import Histogram, histogram
from billhook.orchestrator.allocation.spectra import spectrum
from billhook.orchestrator.checkpoint import open_file
from billhook.orchestrator.events import Event
from billhook.orchestrator.printing import allocation_as_text
from billhook.orchestrator.recipe import merged_options, read_options

SHAPES = [(64, 64), (16, 64), (16, 64), (64, 64), (160, 64), (160, 64), (64, 160)]
MATRICES = [Matrix(str(number), *shape) for number, shape in enumerate(SHAPES)]


@given(
    st.lists(
        st.tuples(st.floats(-0.5, 1.5), st.integers(1, 40), st.integers(2, 40), st.booleans()), min_size=1, max_size=12
    ),
    st.integers(0, 999),
)
def test_budgets_are_exact_and_within_what_can_be_removed(
    drawn: list[tuple[float, int, int, bool]], thousandths: int
) -> None:
    matrices = [
        Matrix(str(number), rows, columns, rows if by_rows else 1)
        for number, (_, rows, columns, by_rows) in enumerate(drawn)
    ]
    sparsity = Fraction(thousandths, 1000)
    removed = to_budget([wanted for wanted, *_ in drawn], matrices, sparsity)
    total = int(sparsity * sum(matrix.size for matrix in matrices))
    most = [matrix.size - matrix.step for matrix in matrices]
    for count, matrix, room in zip(removed, matrices, most, strict=True):
        assert 0 <= count <= room
        assert count % matrix.step == 0
    assert sum(removed) <= total
    slack = [matrix.step for count, matrix, room in zip(removed, matrices, most, strict=True) if count < room]
    assert not slack or total - sum(removed) < min(slack)


def shares(
    name: str,
    matrices: list[Matrix],
    sparsity: float,
    found: Any = None,
    scores: Any = None,
    spectra: Any = None,
    **options: Any,
) -> list[float]:
    """What an allocator makes of the evidence given."""
    allocator = ALLOCATORS[name]
    evidence = Evidence(
        *(matrices, lambda: found, lambda: spectra, lambda multiple: scores, [], lambda *_: [], lambda *_: []),
        lambda *_: [],
    )
    return allocator.sparsities(evidence, sparsity, allocator.options(**options))


def test_constant_scores_are_uniform() -> None:
    removed = to_budget([0.3] * len(MATRICES), MATRICES, Fraction(7, 10))
    assert all(abs(count - 0.7 * matrix.size) <= 1 for count, matrix in zip(removed, MATRICES, strict=True))


def test_what_one_cannot_take_the_others_share() -> None:
    matrices = [Matrix("a", 10, 10), Matrix("b", 10, 10), Matrix("c", 10, 10)]
    first, second, third = to_budget([1.4, 0.5, 0.3], matrices, Fraction(6, 10))
    assert first + second + third == 180
    assert first == 99
    assert second - third == pytest.approx(20, abs=1)


def test_erk_densities_go_with_the_sum_of_the_sides_over_the_product() -> None:
    sparsities = shares("erk", MATRICES, 0.7)
    raw = [(matrix.rows + matrix.columns) / matrix.size for matrix in MATRICES]
    ratios = {round((1 - s) / r, 9) for s, r in zip(sparsities, raw, strict=True) if s > 0}
    assert len(ratios) == 1
    kept = sum((1 - s) * matrix.size for s, matrix in zip(sparsities, MATRICES, strict=True))
    assert kept == pytest.approx(0.3 * sum(matrix.size for matrix in MATRICES))
    dense = shares("erk", MATRICES, 0.2)
    assert 0.0 in dense, "the smallest would be denser than dense"
    assert min(dense) == 0.0


def of(*values: float) -> Histogram:
    levels, counts = np.unique(np.square(values), return_counts=True)
    return Histogram(levels, counts)


def test_global_magnitude_is_one_threshold() -> None:
    matrices = [Matrix("a", 1, 4), Matrix("b", 2, 4)]
    found = [of(1.0, 2.0, 3.0, 4.0), of(1.5, 1.75, 0.25, 0.125, 8.0, 9.0, 10.0, 11.0)]
    assert shares("global-magnitude", matrices, 0.5, found) == [0.5, 0.5]
    assert shares("global-magnitude", matrices, 1 / 3, found) == [0.25, 0.375]
    assert shares("global-magnitude", matrices, 0.0, found) == [0.0, 0.0]


def lamp_by_hand(values: list[list[float]], wanted: int) -> list[float]:
    """The definition, entry by entry."""
    scores = []
    for number, own in enumerate(values):
        ascending = sorted(own)
        scores += [(w * w / sum(v * v for v in ascending[i:]), number) for i, w in enumerate(ascending)]
    gone = [number for _, number in sorted(scores)[:wanted]]
    return [gone.count(number) / len(own) for number, own in enumerate(values)]


@pytest.mark.parametrize("scale", [1.0, 64.0])
@pytest.mark.parametrize("wanted", range(9))
def test_lamp_is_its_definition_and_does_not_mind_the_scale_of_a_linear(wanted: int, scale: float) -> None:
    values = [[0.5, 1.0, 2.0, 4.0, 4.5], [1.0, 1.25, 1.5, 1.75, 16.0]]
    found = [of(*values[0]), of(*(scale * value for value in values[1]))]
    matrices = [Matrix("a", 1, 5), Matrix("b", 1, 5)]
    assert shares("lamp", matrices, wanted / 10, found) == lamp_by_hand(values, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_histograms_count_magnitudes_in_pieces(
    tmp_path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("billhook.orchestrator.inspection.CHUNK_BYTES", 1000)
    weight = torch.randn(70, 30, generator=torch.Generator().manual_seed(0)).to(dtype)
    save_file({"w": weight}, tmp_path / "w.safetensors")
    (entry,) = open_file(tmp_path / "w.safetensors").entries
    found = histogram(entry)
    assert found.counts.sum() == weight.numel()
    expected = weight.bfloat16().double().square().sum()
    assert (found.counts * found.squares).sum() == pytest.approx(float(expected))


EVEN = tuple(number / 100 for number in range(101))
"""What is lost of scores that are all alike."""


def blocks_of(*shares_above: float, total: float = 100.0) -> list[list[ScoreFacts]]:
    return [
        [
            ScoreFacts(f"{number}.a", 1000, total, int(1000 * share), int(1000 * share), EVEN),
            ScoreFacts(f"{number}.b", 1000, total, 0, 10, EVEN),
        ]
        for number, share in enumerate(shares_above)
    ]


def test_owl_spreads_blocks_by_their_outliers() -> None:
    matrices = [Matrix(f"{number}.{name}", 10, 100) for number in range(3) for name in "ab"]
    found = shares("owl", matrices, 0.7, scores=blocks_of(0.01, 0.05, 0.03), spread=0.1)
    assert found[::2] == found[1::2], "a block has one sparsity"
    assert max(found) - min(found) == pytest.approx(0.2)
    assert sum(found) / 6 == pytest.approx(0.7)
    assert found[2] < found[4] < found[0], "more outliers, denser"
    assert shares("owl", matrices, 0.7, scores=blocks_of(0.02, 0.02, 0.02)) == [0.7] * 6
    assert shares("owl", matrices, 0.7, scores=blocks_of(0.01, 0.05, 0.03), spread=0.0) == pytest.approx([0.7] * 6)


def test_blocks_of_which_nothing_is_pruned_do_not_count() -> None:
    matrices = [Matrix(f"{number}.{name}", 10, 100) for number in range(2) for name in "ab"]
    for name in ("owl", "dlp"):
        scores = blocks_of(0.01, 0.05)
        assert shares(name, matrices, 0.7, scores=[[], *scores, []]) == shares(name, matrices, 0.7, scores=scores)


def test_dlp_makes_the_block_with_the_largest_scores_the_sparsest() -> None:
    matrices = [Matrix(f"{number}.{name}", 10, 100) for number in range(3) for name in "ab"]
    scores = [blocks_of(0.0, total=total)[0] for total in (100.0, 400.0, 200.0)]
    scores = [[replace(each, name=f"{number}.{each.name[2:]}") for each in own] for number, own in enumerate(scores)]
    found = shares("dlp", matrices, 0.5, scores=scores)
    assert max(found) - min(found) == pytest.approx(0.3)
    assert sum(found) / 6 == pytest.approx(0.5)
    assert found[0] < found[4] < found[2]


def test_mosaic_is_owl_for_each_kind_of_linear() -> None:
    matrices = [Matrix(f"{number}.{name}", 10, 100) for number in range(3) for name in "ab"]
    found = shares("mosaic", matrices, 0.7, scores=blocks_of(0.01, 0.05, 0.03), spread=0.1)
    assert found[::2] == shares("owl", matrices, 0.7, scores=blocks_of(0.01, 0.05, 0.03), spread=0.1)[::2]
    assert found[1::2] == [0.7] * 3, "these are all alike"


def test_the_experts_of_a_block_are_one_linear_to_mosaic() -> None:
    names = [f"layers.{block}.experts.{expert}.w1.weight" for block in range(2) for expert in range(2)]
    facts = [ScoreFacts(name, 100, 1.0, 0, above, EVEN) for name, above in zip(names, (10, 0, 20, 30), strict=True)]
    matrices = [Matrix(name, 10, 10) for name in names]
    found = shares("mosaic", matrices, 0.5, scores=[facts[:2], facts[2:]])
    assert found == pytest.approx([0.58, 0.58, 0.42, 0.42])


def squared(*scores: float) -> tuple[float, ...]:
    """What is lost of so many scores."""
    ascending = np.concatenate([[0], np.cumsum(np.square(sorted(scores)))])
    return tuple(np.interp(np.linspace(0, len(scores), 101), range(len(scores) + 1), ascending) / ascending[-1])


def test_the_knapsack_has_the_smallest_sum_of_errors_that_brute_force_finds() -> None:
    generator = np.random.default_rng(0)
    scores = [generator.lognormal(sigma=sigma, size=size) for sigma, size in ((0.3, 10), (1.5, 20), (0.8, 10))]
    matrices = [Matrix(str(number), 1, len(each)) for number, each in enumerate(scores)]
    facts = [ScoreFacts(str(number), len(each), 0.0, 0, 0, squared(*each)) for number, each in enumerate(scores)]
    found = shares("error-knapsack", matrices, 0.6, scores=[facts[:1], [], facts[1:]], spread=0.5)
    assert sum(share * matrix.size for share, matrix in zip(found, matrices, strict=True)) == pytest.approx(24)

    def error(counts: list[float]) -> float:
        grid = np.linspace(0, 1, 101)
        return sum(
            float(np.interp(count / matrix.size, grid, each.lost))
            for count, matrix, each in zip(counts, matrices, facts, strict=True)
        )

    best = min(
        error([first, 24 - first - third, third])
        for first in range(11)
        for third in range(11)
        if 0.1 * 20 <= 24 - first - third <= 20 and min(first, third) >= 0.1 * 10
    )
    ours = error([share * matrix.size for share, matrix in zip(found, matrices, strict=True)])
    assert ours <= best + 1e-9
    assert error([6, 12, 6]) > 1.2 * ours, "uniform is worse"
    near = shares("error-knapsack", matrices, 0.6, scores=[facts[:1], [], facts[1:]], spread=0.1)
    assert sum(share * matrix.size for share, matrix in zip(near, matrices, strict=True)) == pytest.approx(24)
    assert min(near) == pytest.approx(0.5)
    assert max(near) <= 0.7 + 1e-9


def test_the_knapsack_of_equal_linears_is_uniform() -> None:
    matrices = [Matrix(f"{number}.{name}", 10, 100) for number in range(3) for name in "ab"]
    assert shares("error-knapsack", matrices, 0.375, scores=blocks_of(0.1, 0.2, 0.3)) == pytest.approx([0.375] * 6)


@pytest.mark.parametrize("name", ["owl", "dlp", "mosaic", "error-knapsack", "alphapruning"])
def test_blocks_in_another_order_get_the_same_shares_in_that_order(name: str) -> None:
    generator = np.random.default_rng(1)
    matrices = [Matrix(f"{number}.{kind}", 8, 16) for number in range(4) for kind in "ab"]
    spectra = [[np.sort(generator.lognormal(sigma=1 + number, size=64)) for _ in "ab"] for number in range(4)]
    scores = [
        [
            ScoreFacts(f"{number}.{kind}", 128, generator.random(), above, above, squared(*generator.lognormal(size=9)))
            for kind, above in zip("ab", generator.integers(1, 40, 2).tolist(), strict=True)
        ]
        for number in range(4)
    ]
    order = [2, 0, 3, 1]
    found = shares(name, matrices, 0.6, scores=scores, spectra=spectra)
    turned = shares(
        name,
        [matrices[2 * number + kind] for number in order for kind in range(2)],
        0.6,
        scores=[scores[number] for number in order],
        spectra=[spectra[number] for number in order],
    )
    assert turned == pytest.approx([found[2 * number + kind] for number in order for kind in range(2)])
    assert len({round(share, 6) for share in found}) > 2
    for sparsity in (Fraction(0), Fraction(6, 10)):
        wanted = shares(name, matrices, float(sparsity), scores=scores, spectra=spectra)
        assert sum(to_budget(wanted, matrices, sparsity)) == int(sparsity * 8 * 128)


# Block means of Llama-2-7B's exponents, from which AlphaPruning at 70 % with a spread of 0.3 makes these sparsities.
EXPONENTS = """
2.136 2.706 3.123 3.124 3.142 3.133 3.013 3.072 2.808 2.910 2.714 2.676 2.844 3.013 3.052 3.121 3.439 3.688 3.976 3.805
4.334 4.274 4.197 4.121 4.195 4.093 3.699 4.244 4.158 4.085 4.278 3.483"""
SPARSITIES = """
.4619 .5647 .6397 .6398 .6431 .6415 .6198 .6305 .5830 .6013 .5660 .5592 .5894 .6198 .6268 .6394 .6965 .7414 .7933 .7624
.8578 .8470 .8331 .8193 .8327 .8144 .7434 .8415 .8261 .8130 .8476 .7046"""


def test_alphapruning_makes_of_exponents_what_the_authors_make() -> None:
    exponents = [float(number) for number in EXPONENTS.split()]
    expected = [float(number) for number in SPARSITIES.split()]
    found = from_exponents(exponents, [1.0] * 32, 0.7, 0.3)
    assert found == pytest.approx(expected, abs=2.5e-4)  # the exponents are rounded
    assert sum(found) / 32 == pytest.approx(0.7)
    assert from_exponents([2.0, 2.0], [1.0, 3.0], 0.6, 0.3) == [0.6, 0.6]
    first, second, third = from_exponents([2.0, 4.0, float("nan")], [1.0, 3.0, 1.0], 0.5, 0.2)
    assert (first + 3 * second + third) / 5 == pytest.approx(0.5)
    assert first < third < second


def test_hills_estimate_finds_the_exponent_of_a_power_law() -> None:
    uniform = np.random.default_rng(0).random(4_000)
    for alpha in (1.5, 2.5, 4.0):
        values = np.sort(uniform ** (-1 / (alpha - 1)))
        assert tail_exponent(values) == pytest.approx(alpha, rel=0.08)
        assert tail_exponent(64.0 * values) == pytest.approx(tail_exponent(values), rel=1e-6), "of any scale"
    assert np.isnan(tail_exponent(np.zeros(5)))
    assert np.isnan(tail_exponent(np.ones(5)))


@pytest.mark.parametrize("shape", [(30, 70), (70, 30)])
def test_spectra_are_squared_singular_values(
    tmp_path: Path, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("billhook.orchestrator.inspection.CHUNK_BYTES", 1000)
    monkeypatch.setattr("billhook.orchestrator.allocation.spectra.BAND", 16)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    save_file({"w": weight}, tmp_path / "w.safetensors")
    (entry,) = open_file(tmp_path / "w.safetensors").entries
    expected = torch.linalg.svdvals(weight.double()).square().flip(0).numpy()
    assert spectrum(entry) == pytest.approx(expected, rel=1e-9)


def test_a_spectrum_that_does_not_fit_is_refused(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--ram 1MiB: --allocation alphapruning needs \d+MiB"):
        allocate(llama, tmp_path / "table.json", allocation="alphapruning", method="magnitude", ram="1MiB")


def test_looking_at_scores_leaves_weights_alone() -> None:
    weight = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    before = weight.clone()
    score_facts("w", weight, torch.ones(4), score_total(weight, torch.ones(4)), 1.0, 1.0)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("workers", [1, 2])
def test_scores_are_those_of_the_dense_model(
    llama: Path, text_file: Path, tmp_path: Path, ray_cluster: None, workers: int
) -> None:
    """Against the same scores from the model as transformers runs it, whole."""
    from transformers import AutoModelForCausalLM

    from billhook.orchestrator.allocating import dense_scores, windows_of
    from billhook.orchestrator.planning import make_plan
    from billhook.orchestrator.request import make_request

    options: Any = {"method": "wanda", "calibration": str(text_file), "samples": 6, "seqlen": 32, "dtype": "float32"}
    recipe, resources = read_options(None, {**options, "workers": workers, "partition_samples": 2})
    request = make_request(llama, recipe)
    windows = windows_of(request)
    assert windows is not None
    found = dense_scores(make_plan(request, resources, tmp_path), windows, 2.0, lambda *_: None)

    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    squares: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            module.register_forward_pre_hook(
                lambda _, given, name=name: squares.update(
                    {name: squares.get(name, 0) + given[0].flatten(0, 1).double().square().sum(dim=0)}
                )
            )
    with torch.no_grad():
        for tokens in windows.tokens:
            model(torch.tensor([tokens]))
    for index, facts in enumerate(found):
        names = [name for name in squares if f"layers.{index}." in name]
        scores = {
            f"{name}.weight": model.get_submodule(name).weight.detach().double().abs() * squares[name].sqrt()
            for name in names
        }
        mean = sum(float(each.sum()) for each in scores.values()) / sum(each.numel() for each in scores.values())
        assert {each.name for each in facts} == set(scores)
        assert sum(each.above for each in facts) > 0
        for each in facts:
            own = scores[each.name]
            assert each.entries == own.numel()
            assert each.total == pytest.approx(float(own.sum()), rel=1e-4)
            assert each.above == pytest.approx(int((own > 2.0 * mean).sum()), abs=3)
            assert each.above_own == pytest.approx(int((own > 2.0 * own.mean()).sum()), abs=3)
            assert each.lost == pytest.approx(squared(*own.flatten().tolist()), rel=2e-3, abs=1e-6)


def test_a_run_by_owl_passes_the_dense_model_once_and_goes_on_with_what_it_found(
    llama: Path, text_file: Path, tmp_path: Path, ray_cluster: None
) -> None:
    options: Any = {
        **{"method": "wanda", "allocation": "owl", "sparsity": 0.6, "allocation_options": {"spread": 0.2}},
        **{"calibration": str(text_file), "samples": 4, "seqlen": 32},
    }
    steps: list[str] = []

    def progress(event: Event) -> None:
        steps.append(step_of(event)[0])

    result = prune(llama, tmp_path / "out", progress=progress, **options)
    assert steps.count("allocate") == 3
    assert result.sparsity == pytest.approx(0.6, abs=2e-3)
    table = allocate(llama, tmp_path / "table.json", **options)
    zeros = {name: int((tensor == 0).sum()) for name, tensor in linears(tmp_path / "out").items()}
    assert zeros == table.removed
    by_block = [Fraction(table.removed[name], table.sizes[name]) for name in sorted(table.removed) if "q_proj" in name]
    assert len(set(by_block)) > 1
    assert verify(tmp_path / "out").ok
    steps.clear()
    with pytest.raises(InputError, match=r"another plan; .*seed"):
        prune(llama, tmp_path / "out", progress=progress, **{**options, "seed": 1})
    with pytest.raises(InputError, match=r"another plan; .*allocation: 'owl .*dlp"):
        prune(llama, tmp_path / "out", progress=progress, **{**options, "allocation": "dlp", "samples": 5})
    with pytest.raises(InputError, match=r"--from-block 9"):
        prune(llama, tmp_path / "out", from_block=9, progress=progress, **{**options, "sparsity": 0.5})
    assert "allocate" not in steps, "what is known beforehand is said beforehand"
    again = prune(llama, tmp_path / "out", progress=progress, **options)
    assert again.already_finished
    assert "allocate" not in steps
    (stored,) = (tmp_path / "out" / "billhook").glob("allocation-*.json")
    stored.write_text(stored.read_text()[:100])
    assert prune(llama, tmp_path / "out", progress=progress, **options).already_finished
    assert steps.count("allocate") == 3, "what cannot be read is found out again"


def test_going_on_with_another_allocation_begins_with_its_defaults(tmp_path: Path) -> None:
    recipe, resources = read_options(
        None, {"allocation": "owl", "allocation_options": {"outlier": 7.0}, "sparsity": 0.7}
    )
    before = recipe.model_dump(mode="json") | resources.model_dump(mode="json")
    assert merged_options(before, {"allocation": "dlp"})["allocation_options"] == {}
    assert merged_options(before, {"allocation_options": {"spread": 0.1}})["allocation_options"] == {
        "outlier": 7.0,
        "spread": 0.1,
    }
    (tmp_path / "table.json").write_text("{}")
    assert merged_options(before, {"allocation": str(tmp_path / "table.json")})["sparsity"] is None
    assert merged_options(before, {"allocation": "erk"})["sparsity"] == 0.7


def test_what_looks_at_samples_goes_with_methods_that_have_them(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--allocation owl looks at calibration samples, which --method magnitude"):
        prune(llama, tmp_path / "out", method="magnitude", allocation="owl")
    assert not (tmp_path / "out").exists()


def linears(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return {name: tensor for name, tensor in tensors.items() if name.endswith("_proj.weight")}


@pytest.mark.parametrize(
    ("allocation", "method"), [("erk", "magnitude"), ("lamp", "wanda"), ("alphapruning", "sparsegpt")]
)
def test_a_run_follows_its_allocation(
    llama: Path, text_file: Path, tmp_path: Path, ray_cluster: None, allocation: str, method: str
) -> None:
    options: dict[str, Any] = {"method": method, "sparsity": 0.6}
    table = allocate(llama, tmp_path / "table.json", allocation=allocation, **options)
    data = {"calibration": str(text_file), "samples": 4, "seqlen": 32}
    result = prune(llama, tmp_path / "out", allocation=allocation, **options, **data)
    sparse = linears(tmp_path / "out")
    assert set(sparse) == set(table.removed)
    zeros = {name: int((tensor == 0).sum()) for name, tensor in sparse.items()}
    assert zeros == pytest.approx(table.removed, abs=1)  # a block of columns may lose a fraction less
    assert result.sparsity == pytest.approx(0.6, abs=2e-3)
    assert len({round(float(table.sparsity_of(name)), 3) for name in table.removed}) > 1
    assert verify(tmp_path / "out").ok
    by_file = prune(llama, tmp_path / "again", allocation=str(tmp_path / "table.json"), method=method, **data)
    assert by_file.sparsity == result.sparsity
    assert all(torch.equal(tensor, sparse[name]) for name, tensor in linears(tmp_path / "again").items())


def test_what_is_planned_says_how_it_is_allocated(llama: Path) -> None:
    from billhook.orchestrator.plan_page import plan_as_text
    from billhook.orchestrator.planning import plan

    assert "allocated by erk: 0." in plan_as_text(plan(llama, method="magnitude", allocation="erk"))
    assert "when it runs" in plan_as_text(plan(llama, method="magnitude", allocation="lamp"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.pop("linears"), r"linears: Field required; 'billhook allocate' writes such files"),
        (lambda content: content["linears"].pop("a"), r"a is missing in the file"),
        (lambda content: content["linears"].update(c={"removed": 1, "of": 2}), r"c is missing in what is pruned"),
        (lambda content: content["linears"]["a"].update(of=13), r"a has 12 entries, not 13"),
        (lambda content: content["linears"]["a"].update(removed=12), r"a: cannot remove 12 of 12"),
        (lambda content: content["linears"]["a"].update(removed=-4), r"a: cannot remove -4"),
        (lambda content: content["linears"]["a"].update(removed=5), r"each of the 4 rows, and 5 is no multiple"),
        (lambda content: content.update(colour="red"), r"colour: Extra inputs are not permitted"),
        (lambda content: content["linears"]["a"].update(rows="1*3"), r"a: its rows are no list of 4 numbers such as"),
        (lambda content: content["linears"]["a"].update(rows="1 1 -1 3"), r"a: its rows are no list of 4 numbers"),
        (lambda content: content["linears"]["a"].update(rows=[1, 1, 1, 1]), r"a\.rows: Input should be a valid string"),
        (lambda content: content["linears"]["a"].update(rows="0*3 4"), r"a: cannot remove 4 of the 3 entries of a row"),
        (lambda content: content["linears"]["a"].update(rows="1*3 3"), r"a: its rows lose 6 entries together, not 4"),
        (lambda content: content["linears"]["b"].update(rows="2"), r"b: the file says what each row loses, and the"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, change: Any, message: str) -> None:
    content = {
        "allocation": "erk",
        "sparsity": 0.5,
        "linears": {"a": {"removed": 4, "of": 12}, "b": {"removed": 2, "of": 4}},
    }
    change(content)
    path = tmp_path / "table.json"
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=message):
        read_allocation(str(path), [Matrix("a", 4, 3, 4), Matrix("b", 2, 2)])


def test_rows_are_written_and_read_and_files_without_them_as_before(tmp_path: Path) -> None:
    content = {
        "allocation": "neuronal",
        "sparsity": 0.5,
        "linears": {"a": {"removed": 6, "of": 12, "rows": "0*2 3*2"}, "b": {"removed": 2, "of": 4}},
    }
    (tmp_path / "table.json").write_text(json.dumps(content))
    matrices = [Matrix("a", 4, 3, 4), Matrix("b", 1, 4)]
    table = read_allocation(str(tmp_path / "table.json"), matrices)
    assert {name: list(counts) for name, counts in table.by_row.items()} == {"a": [0, 0, 3, 3]}
    assert table.rows_of("a") == (0.0, 1.0)
    assert table.rows_of("b") == (0.5, 0.5)
    assert "\na    0.5000  rows 0.0000 to 1.0000\nb    0.5000\n" in allocation_as_text(table)
    write_allocation(table, tmp_path / "again.json")
    assert json.loads((tmp_path / "again.json").read_text()) == content
    assert read_allocation(str(tmp_path / "again.json"), matrices) == table
    alike = replace(table, by_row={})
    assert alike.sha256 == "c7747eb112c79138751aa9b72e472a8b894cb65c7c8b88871ea1811e1cea5978", "as before"
    other = replace(table, by_row={"a": array("i", [0, 1, 2, 3])})
    assert len({table.sha256, alike.sha256, other.sha256}) == 3


def test_a_table_is_never_written_over_something(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(InputError, match="exists"):
        allocate(llama, tmp_path / "thesis.txt", allocation="erk")
    with pytest.raises(InputError, match="no folder"):
        allocate(llama, tmp_path / "no" / "table.json", allocation="erk")
    with pytest.raises(InputError, match="say which"):
        allocate(llama, tmp_path / "table.json")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_sparsity_that_contradicts_the_file_is_refused(llama: Path, tmp_path: Path) -> None:
    allocate(llama, tmp_path / "table.json", allocation="erk", sparsity=0.6)
    with pytest.raises(InputError, match=r"--sparsity 0\.5 contradicts --allocation"):
        prune(llama, tmp_path / "out", method="magnitude", sparsity=0.5, allocation=str(tmp_path / "table.json"))
    assert not (tmp_path / "out").exists()
