"""The same bytes for any number of workers, without Ray: threads stand for workers."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from billhook.layerworkers import solving
from billhook.layerworkers.collective import Alone
from billhook.layerworkers.methods import METHODS, method_named
from billhook.layerworkers.patterns import NM, Pattern, PerRow, Unstructured, of_rows
from billhook.layerworkers.problem import LinearProblem, RowsOf
from billhook.layerworkers.reduction import even_ranges, total
from billhook.layerworkers.scratch import DiskParking, MemoryParking, Parking
from billhook.layerworkers.sharing import Pace
from billhook.layerworkers.solving import Together, solve_stage
from billhook.layerworkers.statistics import Accumulator, with_deviations
from billhook.layerworkers.stopwatch import Stopwatch
from billhook.layerworkers.tasks import BlockTask, LinearReport, LinearTask

SAMPLES = 22  # six partitions of four, the last one short


def problem(dtype: torch.dtype) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    torch.manual_seed(0)
    weights = {
        "q": torch.randn(96, 64).to(dtype),
        "k": torch.randn(40, 64).to(dtype),
        "v": torch.randn(33, 64).to(dtype),
    }
    mixing = torch.eye(64) + 0.3 * torch.randn(64, 64)
    return weights, [(torch.randn(1, 12, 64) @ mixing).bfloat16() for _ in range(SAMPLES)]


@dataclass(frozen=True)
class Solved:
    """A pruned linear."""

    weight: torch.Tensor
    report: LinearReport


def solved(
    weights: dict[str, torch.Tensor],
    numbered: list[tuple[int, torch.Tensor]],
    task: BlockTask,
    group: Any,
    parking: Parking | None = None,
    apart: bool = False,
    of_output: bool = False,
) -> list[Solved]:
    """What one worker of the group has in the end, given the numbered inputs of its samples.

    apart: each linear is taken to have an input of its own. of_output: what deviates is as wide as its output.
    """
    together = []
    for linears in [[linear] for linear in task.linears] if apart else [task.linears]:
        nodes = []
        statistic = method_named(linears[0].method).statistic
        width = len(weights[linears[0].disk_name]) if of_output else 64
        if linears[0].correction:
            statistic = with_deviations(width)
        if statistic is not None:
            accumulator = Accumulator(statistic, 64, task.partition_samples, torch.device("cpu"), parking)
            for number, x in numbered:
                accumulator.add(number, x, deviation(x, width) if linears[0].correction else None)
            nodes = accumulator.nodes(park=parking is not None)
        together.append(Together(linears, nodes, statistic, of_output))
    own = {name: weight.clone() for name, weight in weights.items()}
    reports = solve_stage(together, own, task, group, torch.device("cpu"), Stopwatch(), gradient_squares(weights))
    return [Solved(own[report.name], report) for report in reports]


def gradient_squares(weights: dict[str, torch.Tensor]) -> dict[str, RowsOf]:
    """What a method that asks for gradients is told of them."""
    generator = torch.Generator().manual_seed(2)

    def rows(matrix: torch.Tensor, first: int, last: int) -> torch.Tensor:
        return matrix[first:last].clone()

    return {name: partial(rows, torch.rand(each.shape, generator=generator)) for name, each in weights.items()}


def deviation(x: torch.Tensor, width: int) -> torch.Tensor:
    """What depends on the input, and on something else."""
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(64, width, generator=generator).to(x.dtype)
    return 0.05 * (x @ mixing) + 0.2 * torch.randn(*x.shape[:-1], width, generator=generator).to(x.dtype)


ALL_SOLVE = Pace(exchange_seconds=0.0, bytes_per_second=float("inf"))
WHOLE_LINEARS = Pace(exchange_seconds=1e9, bytes_per_second=float("inf"))


def solved_by(
    workers: int,
    run_group: Any,
    method: str,
    pattern: Pattern,
    dtype: torch.dtype,
    parking: Callable[[], Parking | None] = lambda: None,
    pace: Pace = Pace(),
    apart: bool = False,
    correction: float = 0.0,
    of_output: bool = False,
) -> list[list[Solved]]:
    weights, inputs = problem(dtype)
    table = method_named(method)
    tasks = [
        LinearTask(name, name, of_rows(pattern, 0, len(weight)), method, table.options(), correction)
        for name, weight in weights.items()
    ]
    partitions = 0 if table.statistic is None else 6
    sizes = (4, partitions, 16)
    task = BlockTask(0, (), (), tuple(tasks), "lockstep", "", *sizes, pace=pace)
    numbered = list(enumerate(inputs))

    def work(group: Any) -> list[Solved]:
        start, stop = even_ranges(partitions, group.size)[group.rank]
        return solved(weights, numbered[start * 4 : stop * 4], task, group, parking(), apart, of_output)

    results: list[list[Solved]] = run_group(workers, work)
    return results


CHAINS = ["wanda+dsnot", "sparsegpt+swaps", "admm+swaps+refit", "magnitude+exact-refit"]


@pytest.mark.parametrize("method", [*METHODS, *CHAINS])
@pytest.mark.parametrize("pattern", [Unstructured(Fraction(1, 2)), NM(2, 4)])
@pytest.mark.parametrize("ways", ["split", "dealt", "apart"])
def test_any_number_of_workers_gives_the_same_bytes(run_group: Any, method: str, pattern: Pattern, ways: str) -> None:
    pace = ALL_SOLVE if ways == "split" else WHOLE_LINEARS
    (reference,) = solved_by(1, run_group, method, pattern, torch.bfloat16)
    for workers in (2, 3, 5):
        for each in solved_by(workers, run_group, method, pattern, torch.bfloat16, pace=pace, apart=ways == "apart"):
            assert [one.report for one in each] == [other.report for other in reference]
            for one, other in zip(each, reference, strict=True):
                assert torch.equal(one.weight.view(torch.int16), other.weight.view(torch.int16))


@pytest.mark.parametrize("method", ["wanda+swaps", "magnitude"])
def test_rows_that_lose_numbers_of_their_own_lose_them_whoever_has_them(run_group: Any, method: str) -> None:
    counts = tuple((11 * row) % 64 for row in range(96))
    (reference,) = solved_by(1, run_group, method, PerRow(counts, 64), torch.bfloat16)
    for each in reference:
        rows = len(each.weight)
        assert tuple((each.weight == 0).sum(dim=1).tolist()) == counts[:rows]
        assert (each.report.removed, each.report.pattern) == (sum(counts[:rows]), "unstructured")
    for workers, pace in ((2, ALL_SOLVE), (3, ALL_SOLVE), (2, WHOLE_LINEARS)):
        for own in solved_by(workers, run_group, method, PerRow(counts, 64), torch.bfloat16, pace=pace):
            assert [one.report for one in own] == [other.report for other in reference]
            assert all(torch.equal(a.weight, b.weight) for a, b in zip(own, reference, strict=True))


@pytest.mark.parametrize("method", ["auto", "sparsegpt", "wanda", "admm+refit"])
@pytest.mark.parametrize("pattern", [Unstructured(Fraction(1, 2)), NM(2, 4)])
@pytest.mark.parametrize(("apart", "of_output"), [(False, False), (True, False), (True, True)])
def test_corrected_linears_have_the_same_bytes_with_any_number_of_workers(
    run_group: Any, method: str, pattern: Pattern, apart: bool, of_output: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def of(workers: int, pace: Pace, share: float = 0.5) -> list[list[Solved]]:
        return solved_by(
            workers, run_group, method, pattern, torch.bfloat16, lambda: None, pace, apart, share, of_output
        )

    (reference,), (plain,) = of(1, ALL_SOLVE), of(1, ALL_SOLVE, 0.0)
    assert not any(torch.equal(a.weight, b.weight) for a, b in zip(reference, plain, strict=True))
    assert [each.report.removed for each in reference] == [each.report.removed for each in plain]
    monkeypatch.setattr("billhook.layerworkers.scratch.BAND_BYTES", 3000)  # several bands in every tensor
    for workers in (2, 3):
        for pace in (ALL_SOLVE, WHOLE_LINEARS):
            for each in of(workers, pace):
                assert [one.report for one in each] == [other.report for other in reference]
                assert all(torch.equal(a.weight, b.weight) for a, b in zip(each, reference, strict=True))


@pytest.mark.parametrize("of_output", [False, True])
def test_a_correction_is_the_ridge_regression_of_what_deviates(of_output: bool) -> None:
    weights, inputs = problem(torch.bfloat16)
    weight_RC = weights["q"].float()
    width = len(weight_RC) if of_output else 64
    accumulator = Accumulator(with_deviations(width), 64, 4, torch.device("cpu"))
    for number, x in enumerate(inputs):
        accumulator.add(number, x, deviation(x, width))
    statistic = total(accumulator.nodes(), 6)
    corrected = LinearProblem(statistic, 64, 16, Alone(), torch.device("cpu")).corrected(weight_RC, 0, 0.5, of_output)
    x_TC = torch.cat([x.reshape(-1, 64) for x in inputs]).double()
    d_TK = torch.cat([deviation(x, width).reshape(-1, width) for x in inputs]).double()
    gram_CC = x_TC.T @ x_TC
    explained_KC = d_TK.T @ x_TC @ torch.linalg.inv(gram_CC + 0.1 * torch.diag(gram_CC.diagonal()))
    expected = weight_RC.double() + 0.5 * (explained_KC if of_output else weight_RC.double() @ explained_KC)
    assert torch.allclose(corrected.double(), expected, atol=1e-4)
    assert (corrected - weight_RC).abs().max() > 0.01


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "admm"])
@pytest.mark.parametrize("workers", [1, 3])
def test_parked_statistics_give_the_same_bytes(
    run_group: Any, method: str, workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pattern = Unstructured(Fraction(1, 2))
    (reference,) = solved_by(1, run_group, method, pattern, torch.bfloat16)
    monkeypatch.setattr("billhook.layerworkers.scratch.BAND_BYTES", 1000)  # several bands in every tensor
    for parking in (MemoryParking, lambda: DiskParking(str(tmp_path))):
        for each in solved_by(workers, run_group, method, pattern, torch.bfloat16, parking):
            assert [one.report for one in each] == [other.report for other in reference]
            assert all(torch.equal(one.weight, other.weight) for one, other in zip(each, reference, strict=True))
    assert not list(tmp_path.iterdir())


def test_zeros_are_positive_and_counted_as_written(run_group: Any) -> None:
    (results,) = solved_by(1, run_group, "wanda", NM(2, 4), torch.float16)
    for each in results:
        zero = each.weight == 0
        assert not (zero & torch.signbit(each.weight)).any()
        assert each.report.zeros == int(zero.sum()) == each.report.removed == each.weight.numel() // 2
        assert each.weight.dtype == torch.float16


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_mask_methods_keep_float64_survivors_to_the_last_bit(run_group: Any, method: str) -> None:
    weights, inputs = problem(torch.float32)
    dense = {name: weight.double() / 3 for name, weight in weights.items()}
    for weight in dense.values():
        weight[0, :4] = torch.tensor([1e-50, -1e-50, 1.0, 2.0])  # the first two are 0 in float32
    table = method_named(method)
    tasks = [LinearTask(name, name, NM(2, 4), method, table.options()) for name in dense]
    task = BlockTask(0, (), (), tuple(tasks), "lockstep", "", 4, 6 if table.statistic else 0, 16)
    numbered = list(enumerate(inputs))
    (results,) = run_group(1, lambda group: solved(dense, numbered, task, group))
    for each in results:
        kept = each.weight != 0
        assert torch.equal(each.weight[kept], dense[each.report.name][kept])
        assert each.report.zeros == int((~kept).sum()) == kept.numel() // 2


@pytest.mark.parametrize("method", [*METHODS, *CHAINS])
def test_nothing_asked_is_nothing_changed(run_group: Any, method: str) -> None:
    weights, _ = problem(torch.bfloat16)
    (results,) = solved_by(1, run_group, method, Unstructured(Fraction(0)), torch.bfloat16)
    for each in results:
        assert torch.equal(each.weight, weights[each.report.name])


def test_a_worker_that_has_sent_its_sums_holds_them_no_more_while_it_solves(
    run_group: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it would hold a Gram beside the factor that it is sent."""
    weights, inputs = problem(torch.bfloat16)
    tasks = [LinearTask(name, name, NM(2, 4), "sparsegpt", METHODS["sparsegpt"].options()) for name in weights]
    task = BlockTask(0, (), (), tuple(tasks), "lockstep", "", 4, 6, 16, pace=ALL_SOLVE)
    sums: dict[int, list[weakref.ref[Any]]] = {}
    alive: list[bool] = []
    solve_share = solving._solve_share

    def watched(linear: Any, weight: Any, squares: Any, ranges: Any, group: Any, *others: Any) -> Any:
        share = solve_share(linear, weight, squares, ranges, group, *others)
        if group.rank == 1:
            alive.extend(each() is not None for each in sums[1])
        return share

    monkeypatch.setattr(solving, "_solve_share", watched)

    def work(group: Any) -> None:
        accumulator = Accumulator(METHODS["sparsegpt"].statistic, 64, 4, torch.device("cpu"))  # type: ignore[arg-type]
        start, stop = even_ranges(6, 2)[group.rank]
        for number in range(start * 4, min(stop * 4, SAMPLES)):
            accumulator.add(number, inputs[number])
        nodes = accumulator.nodes()
        sums[group.rank] = [weakref.ref(node.total) for node in nodes]
        own = {name: weight.clone() for name, weight in weights.items()}
        together = Together(task.linears, nodes, METHODS["sparsegpt"].statistic)
        list(solving.solve_stage([together], own, task, group, torch.device("cpu"), Stopwatch()))

    run_group(2, work)
    assert alive
    assert not any(alive)
