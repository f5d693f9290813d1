"""Allocators that try candidates: their formulas, and a run that follows one."""

from __future__ import annotations

import itertools
import math
import shutil
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from steps import step_of

from billhook.layerworkers.candidates import Deviation, Perturb, Prune, PruneRows, perturbed
from billhook.layerworkers.errors import OptionError
from billhook.orchestrator import allocate, prune, verify
from billhook.orchestrator.allocation import (
    ALLOCATORS,
    Allocation,
    Candidate,
    Evidence,
    Matrix,
    allocated,
    tabled,
    to_budget,
)
from billhook.orchestrator.allocation.contract import ForRows
from billhook.orchestrator.allocation.ecoflap import importances_of, kept_by_importance
from billhook.orchestrator.allocation.neuronal import slope
from billhook.orchestrator.allocation.outlets import Outlet
from billhook.orchestrator.allocation.shapley import contributions, shapley, windows_of
from billhook.orchestrator.history import read_history
from billhook.orchestrator.promised_rows import promised_rows

NAMES = ["neuronal", "sv-nup", "ecoflap"]


def evidence_of(
    blocks: Sequence[int],
    loss: Callable[[Candidate], float] = lambda _: 1.0,
    deviation: Callable[[Candidate], float] = lambda _: 1.0,
) -> Evidence:
    """Two linears in each of some blocks, and what candidates would come out as."""
    matrices = [Matrix(f"{block}.{name}", 8, 16) for block in blocks for name in "ab"]

    def unknown(*_: object) -> Any:
        raise AssertionError

    return Evidence(
        *(matrices, unknown, unknown, unknown, [block for block in blocks for _ in "ab"]),
        lambda candidates, samples: [[Deviation(deviation(each) / 2, {})] * 2 for each in candidates],
        lambda candidates, samples: [loss(each) for each in candidates],
        unknown,
        outlets=[None for _ in matrices],
    )


def shares(name: str, evidence: Evidence, sparsity: float, **options: Any) -> list[float]:
    found = ALLOCATORS[name].sparsities(evidence, sparsity, ALLOCATORS[name].options(**options))
    assert not isinstance(found, ForRows)
    return found


@pytest.mark.parametrize(("sparsity", "count"), [(0.7, 14), (0.8, 13), (0.9, 13)])
def test_neuronal_tries_the_authors_slopes(sparsity: float, count: int) -> None:
    seen: list[Candidate] = []

    def deviation(candidate: Candidate) -> float:
        seen.append(candidate)
        return 1.0

    found = shares("neuronal", evidence_of(range(5), deviation=deviation), sparsity)
    grid = [0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.09, 0.10, 0.12, 0.15, 0.20, 0.25][:count]
    assert len(seen) == count
    for half, candidate in zip(grid, seen, strict=True):
        own = [each.sparsity for each in candidate.values() if isinstance(each, Prune)]
        assert own == pytest.approx([min(sparsity + half * (i / 2 - 1), 0.99) for i in range(5)])
    assert found[::2] == pytest.approx([sparsity + 0.01 * (i / 2 - 1) for i in range(5)]), "of equal ones the first"


def test_neuronal_takes_the_slope_with_the_smallest_sum() -> None:
    def deviation(candidate: Candidate) -> float:
        first, last = candidate[2], candidate[7]
        assert isinstance(first, Prune)
        assert isinstance(last, Prune)
        return abs(last.sparsity - first.sparsity - 0.24)

    found = shares("neuronal", evidence_of([2, 4, 7], deviation=deviation), 0.7)
    assert found == pytest.approx([0.58, 0.58, 0.7, 0.7, 0.82, 0.82])
    assert slope(0.5, 0.2, 1) == [0.5]
    assert slope(0.1, 0.2, 3) == pytest.approx([0.01, 0.1, 0.3])
    assert sum(slope(0.6, 0.25, 9)) / 9 == pytest.approx(0.6)


SHRUNK = np.array([3.0, 0.0, 1.0, -1.0, 0.5, 0.25, 2.0, 2.0], dtype=np.float32)


def rows_of(own_deviation: Callable[[float], float], seen: list[Candidate], step: int = 8) -> Evidence:
    """Three blocks of four linears: rows of a show in c's input; what the spread of rows is worth."""
    matrices = [Matrix(f"{block}.{name}", 8, 100, step) for block in range(3) for name in "abcd"]

    def deviations(candidates: Sequence[Candidate], samples: int) -> list[list[Deviation]]:
        seen.extend(candidates)
        found = []
        for candidate in candidates:
            spreads = {change.spread if isinstance(change, PruneRows) else 0.0 for change in candidate.values()}
            shrinkage = [
                {f"{block}.a": np.zeros(100, np.float32), f"{block}.c": SHRUNK, f"{block}.d": np.ones(8, np.float32)}
                for block in range(3)
            ]
            found.append([Deviation(own_deviation(max(spreads)), shrinkage[block]) for block in range(3)])
        return found

    def unknown(*_: object) -> Any:
        raise AssertionError

    return Evidence(
        *(
            matrices,
            unknown,
            unknown,
            unknown,
            [block for block in range(3) for _ in "abcd"],
            deviations,
            unknown,
            unknown,
        ),
        outlets=[outlet for block in range(3) for outlet in (Outlet(f"{block}.c"), None, Outlet(f"{block}.d"), None)],
    )


@pytest.mark.parametrize("sparsity", [0.7, 0.85])
def test_neuronal_spreads_rows_by_the_authors_grid_around_the_best_slope(sparsity: float) -> None:
    seen: list[Candidate] = []
    evidence = rows_of(lambda spread: abs(spread - 0.12), seen)
    found = ALLOCATORS["neuronal"].sparsities(evidence, sparsity, ALLOCATORS["neuronal"].options())
    assert isinstance(found, ForRows)
    grid = [0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.09, 0.10, 0.12, 0.15, 0.20, 0.25]
    best, *others = seen[-15:]
    assert len(seen) - 15 == (14 if sparsity < 0.8 else 13)
    assert best == seen[0], "not to spread at all is what the first step chose"
    assert [next(c.spread for c in each.values() if isinstance(c, PruneRows)) for each in others] == grid
    for each in others:
        first, second, last = (each[block] for block in range(3))
        assert last == best[2], "the last block is left alone"
        for own, plain in ((first, best[0]), (second, best[1])):
            assert isinstance(own, PruneRows)
            assert isinstance(plain, Prune)
            assert own.sparsity == plain.sparsity
    assert found.spread == 0.12
    assert set(found.scores) == {"0.a", "1.a"}, "where rows show, and not all alike"
    assert np.array_equal(found.scores["0.a"], SHRUNK)
    table = allocated("neuronal", ALLOCATORS["neuronal"].options(), evidence, Fraction(str(sparsity)))
    plain = allocated("neuronal", ALLOCATORS["neuronal"].options(step="block"), evidence, Fraction(str(sparsity)))
    assert table.removed == plain.removed
    assert not plain.by_row
    assert {name: sum(counts) for name, counts in table.by_row.items()} == {
        name: table.removed[name] for name in ("0.a", "1.a")
    }
    assert table.by_row["0.a"].index(min(table.by_row["0.a"])) == 0, "the norm that shrank most keeps most"
    assert table.by_row["0.a"].index(max(table.by_row["0.a"])) == 3


@pytest.mark.parametrize(
    ("deviation", "step", "options"),
    [
        (lambda spread: spread, 8, {}),
        (lambda spread: 1.0, 8, {}),
        (lambda spread: -spread, 8, {"step": "block"}),
        (lambda spread: -spread, 1, {}),
    ],
    ids=["better so", "of equal ones the first", "not asked for", "compared over the linear"],
)
def test_rows_lose_the_same(deviation: Callable[[float], float], step: int, options: dict[str, Any]) -> None:
    seen: list[Candidate] = []
    found = shares("neuronal", rows_of(deviation, seen, step), 0.7, **options)
    assert found == shares("neuronal", rows_of(deviation, seen, step), 0.7, step="block")
    assert len(seen) == 28 + (15 if step == 8 and not options else 0)


def games(players: int) -> tuple[dict[frozenset[int], float], frozenset[int]]:
    generator = np.random.default_rng(players)
    everyone = frozenset(range(players))
    sets = [frozenset(each) for size in range(players + 1) for each in itertools.combinations(everyone, size)]
    return {each: float(generator.random()) for each in sets}, everyone


@pytest.mark.parametrize("players", [1, 2, 3, 4])
def test_shapley_values_are_the_mean_over_all_orders(players: int) -> None:
    value, everyone = games(players)
    found = shapley(sorted(everyone), value.__getitem__)
    for player in everyone:
        gains = []
        for order in itertools.permutations(everyone):
            before = frozenset(order[: order.index(player)])
            gains.append(value[before | {player}] - value[before])
        assert found[player] == pytest.approx(math.fsum(gains) / len(gains))
    assert sum(found.values()) == pytest.approx(value[everyone] - value[frozenset()]), "efficiency"


def test_players_that_are_alike_get_alike_and_a_dummy_gets_nothing() -> None:
    def value(dense: frozenset[int]) -> float:
        return len(dense & {0, 1}) ** 2 + 3.0 * (2 in dense)  # 3 adds nothing

    found = shapley(range(4), value)
    assert found[0] == pytest.approx(found[1])
    assert found == pytest.approx({0: 2.0, 1: 2.0, 2: 3.0, 3: 0.0})


@pytest.mark.parametrize("blocks", [2, 3, 4])
def test_one_window_over_all_blocks_is_the_shapley_value(blocks: int) -> None:
    loss_without, everyone = games(blocks)
    windows = windows_of(range(blocks), 8)
    assert windows == [tuple(range(blocks))]
    expected = shapley(sorted(everyone), lambda dense: -loss_without[everyone - dense])
    assert contributions(windows, loss_without) == pytest.approx(expected)


def test_windows_slide_by_one_block() -> None:
    assert windows_of([0, 2, 3, 5], 3) == [(0, 2, 3), (2, 3, 5)]


def test_sv_nup_keeps_blocks_denser_without_which_the_loss_is_larger() -> None:
    worth = {0: 3.0, 1: 0.5, 2: 1.0, 3: 0.1, 4: 2.0}
    seen: list[Candidate] = []

    def loss(candidate: Candidate) -> float:
        seen.append(candidate)
        assert all(change == Prune(0.6) for change in candidate.values())
        return sum(worth[block] for block in candidate)

    found = shares("sv-nup", evidence_of(range(5), loss), 0.6, spread=0.1)[::2]
    assert len(seen) == len({tuple(each) for each in seen}) == 1 + 5 + 4 + 3 + 3, "no set of blocks is tried twice"
    assert sorted(range(5), key=found.__getitem__) == [0, 4, 2, 1, 3]
    assert max(found) - min(found) == pytest.approx(0.2)
    assert sum(found) / 5 == pytest.approx(0.6)


def test_what_is_kept_goes_with_importance_between_the_floor_and_all() -> None:
    kept = kept_by_importance([1.0, 3.0, 2.0], [100, 100, 100], 0.7)
    assert kept == pytest.approx([20 + 30 / 6, 20 + 90 / 6, 20 + 60 / 6])
    kept = kept_by_importance([1.0, 98.0, 1.0], [100, 20, 100], 0.5)
    assert kept == pytest.approx([45.0, 20.0, 45.0]), "what one cannot take the others share"
    assert kept_by_importance([0.0, 0.0], [10, 30], 0.4) == pytest.approx([6, 18])
    assert kept_by_importance([5.0, 0.0], [10, 30], 0.05) == pytest.approx([10, 28])


def test_ecoflap_adds_and_subtracts_the_same_noise() -> None:
    seen: list[Candidate] = []

    def loss(candidate: Candidate) -> float:
        seen.append(candidate)
        ((block, change),) = candidate.items()
        assert isinstance(change, Perturb)
        return change.scale * (1 + block)

    found = shares("ecoflap", evidence_of(range(4), loss), 0.7, scale=0.01)[::2]
    for plus, minus in zip(seen[:4], seen[4:], strict=True):
        ((block, one),) = plus.items()
        other = minus[block]
        assert isinstance(one, Perturb)
        assert other == Perturb(-one.scale, one.seed)
    assert 1 - np.array(found) == pytest.approx(0.2 + 0.4 * np.array([0.1, 0.2, 0.3, 0.4]))


def test_importances_are_the_directional_derivative() -> None:
    """Of a small network in float32, against autograd with the same noise."""
    torch.manual_seed(0)
    weights = [torch.randn(12, 20) / 4, torch.randn(5, 12) / 3]
    x, labels = torch.randn(64, 20), torch.randint(0, 5, (64,))

    def loss(changed: Sequence[torch.Tensor]) -> torch.Tensor:
        hidden = torch.tanh(x.to(changed[0].dtype) @ changed[0].T)
        return torch.nn.functional.cross_entropy(hidden @ changed[1].T, labels)

    for scale in (2e-3, 1e-3):
        noisy = [
            [perturbed(weight, Perturb(sign * scale, 9), number) for number, weight in enumerate(weights)]
            for sign in (1, -1)
        ]
        noise = [(one.double() - weight) / scale for one, weight in zip(noisy[0], weights, strict=True)]
        assert all(float(each.std()) == pytest.approx(1.0, abs=0.15) for each in noise)
        exact = [weight.double().requires_grad_() for weight in weights]
        gradients = torch.autograd.grad(loss(exact), exact)
        along = sum(float((gradient * z).sum()) for gradient, z in zip(gradients, noise, strict=True))
        above, below = (float(loss([each.double() for each in own])) for own in noisy)
        assert importances_of([above], [below], scale) == pytest.approx([abs(along)], rel=1e-2)


@pytest.mark.parametrize("name", NAMES)
def test_budgets_are_exact_and_alike_is_uniform(name: str) -> None:
    evidence = evidence_of([0, 1, 3, 4])
    for sparsity in (Fraction(0), Fraction(3, 10), Fraction(7, 10), Fraction(95, 100)):
        found = shares(name, evidence, float(sparsity))
        removed = to_budget(found, evidence.matrices, sparsity)
        assert sum(removed) == int(sparsity * 8 * 128)
        assert all(0 <= count < 128 for count in removed)
        if name != "neuronal":
            assert found == pytest.approx([float(sparsity)] * 8)


@pytest.mark.parametrize(("name", "options"), [("sv-nup", {"window": 4}), ("ecoflap", {})])
def test_blocks_in_another_order_get_the_same_shares_in_that_order(name: str, options: dict[str, Any]) -> None:
    worth, order = [3.0, 0.5, 1.0, 2.0], [2, 0, 3, 1]

    def loss_of(worth: Sequence[float]) -> Callable[[Candidate], float]:
        def loss(candidate: Candidate) -> float:
            scales = {each: change.scale if isinstance(change, Perturb) else 1.0 for each, change in candidate.items()}
            return math.fsum(worth[block] * scale for block, scale in scales.items())

        return loss

    found = shares(name, evidence_of(range(4), loss_of(worth)), 0.6, **options)[::2]
    turned = shares(name, evidence_of(range(4), loss_of([worth[block] for block in order])), 0.6, **options)[::2]
    assert turned == pytest.approx([found[block] for block in order])
    assert len({round(share, 6) for share in found}) == 4


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("neuronal", {"samples": 0}, "samples=0: expected at least 1"),
        ("neuronal", {"step": "row"}, "step=row: expected both or block"),
        ("sv-nup", {"window": 9}, "window=9: expected 1 to 8"),
        ("sv-nup", {"spread": 0.7}, r"spread=0\.7: expected a number between"),
        ("ecoflap", {"scale": 0.0}, r"scale=0\.0: expected a positive number"),
        ("ecoflap", {"seed": -1}, "seed=-1: expected 0 to 4294967295"),
    ],
)
def test_bad_options_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        ALLOCATORS[name].options(**options)


def options_of(text_file: Path, name: str) -> Any:
    return {
        **{"method": "wanda", "sparsity": 0.6, "calibration": str(text_file), "samples": 4, "seqlen": 32},
        **{"dtype": "float32", "allocation": name, "allocation_options": {"samples": 2}},
    }


def test_a_run_follows_what_candidates_tell(llama: Path, text_file: Path, tmp_path: Path, ray_cluster: None) -> None:
    options = options_of(text_file, "neuronal")
    prune(llama, tmp_path / "out", workers=2, **options)
    (stored,) = (tmp_path / "out" / "billhook").glob("allocation-*.json")
    table = tabled(stored)
    assert table is not None
    assert table.sparsity == pytest.approx(Fraction(6, 10), abs=2e-3)
    first, second, third = (table.sparsity_of(name) for name in sorted(table.removed) if "q_proj" in name)
    assert first < second < third
    assert len(table.by_row) == 12
    check_rows(tmp_path / "out", table)
    assert verify(tmp_path / "out").ok
    steps: list[str] = []
    again = prune(llama, tmp_path / "out", progress=lambda event: steps.append(step_of(event)[0]), **options)
    assert again.already_finished
    assert "allocate" not in steps, "what was found out is kept"

    shutil.copy(stored, tmp_path / "table.json")
    options |= {"allocation": str(tmp_path / "table.json"), "allocation_options": {}, "sparsity": None}
    with pytest.raises(OptionError, match=r"the file says what each row loses, and the method compares all rows"):
        prune(llama, tmp_path / "by-file", **{**options, "method": "sparsegpt"})
    assert not (tmp_path / "by-file").exists()
    prune(llama, tmp_path / "by-file", workers=1, **{**options, "method": "wanda+dsnot"})
    check_rows(tmp_path / "by-file", table)
    (tmp_path / "table.json").write_text("{}")
    assert promised_rows(tmp_path / "by-file", read_history(tmp_path / "by-file")) == {}, "the table is another one now"


@pytest.mark.thorough
def test_what_is_allocated_alone_is_what_a_run_allocates(
    llama: Path, text_file: Path, tmp_path: Path, ray_cluster: None
) -> None:
    options = options_of(text_file, "neuronal")
    table = allocate(llama, tmp_path / "table.json", workers=3, **options)
    prune(llama, tmp_path / "out", workers=1, **options)
    (stored,) = (tmp_path / "out" / "billhook").glob("allocation-*.json")
    assert stored.read_bytes() == (tmp_path / "table.json").read_bytes()
    assert tabled(stored) == table


def check_rows(output: Path, table: Allocation) -> None:
    assert promised_rows(output, read_history(output)) == table.by_row
    for path in sorted(output.glob("*.safetensors")):
        for name, weight in load_file(path).items():
            if name in table.removed:
                zeros = (weight == 0).sum(dim=1).tolist()
                assert zeros == list(table.by_row.get(name, [table.removed[name] // len(weight)] * len(weight)))


def test_losses_of_candidates_come_from_all_workers(
    llama: Path, text_file: Path, tmp_path: Path, ray_cluster: None
) -> None:
    table = allocate(llama, tmp_path / "table.json", workers=2, **options_of(text_file, "ecoflap"))
    by_block = [table.sparsity_of(name) for name in sorted(table.removed) if "q_proj" in name]
    assert len(set(by_block)) == 3
    assert max(by_block) <= 0.7 + 0.01
