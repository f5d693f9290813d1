"""What is predicted to move between workers is what moves."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch

from billhook.layerworkers.collective import Counted
from billhook.layerworkers.methods import METHODS, Method, Solver, method_named
from billhook.layerworkers.patterns import NM, Pattern, Unstructured
from billhook.layerworkers.reduction import Node, even_ranges, fold, node_count
from billhook.layerworkers.sharing import Pace
from billhook.layerworkers.solving import Together, solve_stage
from billhook.layerworkers.statistics import Accumulator, Statistic, with_deviations
from billhook.layerworkers.stopwatch import Stopwatch
from billhook.layerworkers.tasks import BlockTask, LinearTask
from billhook.layerworkers.traffic import Matrix, Traffic, stage_traffic

PARTITIONS, COLUMNS = 7, 300
EACH_KIND = [
    *("magnitude", "wanda", "sparsegpt", "thanos", "net-trim", "admm", "alps", "wanda+dsnot", "sparsegpt+swaps"),
    "auto",
]
"""Methods that move all there is to be moved: every form of a statistic, thresholds, counts, and a correction."""
ROWS = {"q": 96, "k": 40, "v": 33}


def statistic_of(method: Method) -> Statistic | None:
    return with_deviations(COLUMNS) if method.correction else method.statistic


def moved(
    run_group: Any, workers: int, method: str, pattern: Pattern, pace: Pace, apart: bool = False
) -> list[list[int]]:
    """Solve linears with one input, or each with its own; return what each worker moved, exchange by exchange."""
    table = method_named(method)
    torch.manual_seed(0)
    weights = {name: torch.randn(rows, COLUMNS).bfloat16() for name, rows in ROWS.items()}
    inputs = torch.randn(PARTITIONS, 400, COLUMNS)
    linears = tuple(LinearTask(name, name, pattern, method, table.options(), table.correction) for name in weights)
    summed = statistic_of(table)
    task = BlockTask(
        *(0, (), (), linears, "lockstep", "", 1, PARTITIONS if table.statistic else 0, 16),
        pace=pace,
    )

    def work(group: Any) -> list[int]:
        counts: list[int] = []
        together = []
        for members in [[linear] for linear in linears] if apart else [linears]:
            nodes: list[Node] = []
            if summed is not None:
                accumulator = Accumulator(summed, COLUMNS, 1, torch.device("cpu"))
                for number in range(*even_ranges(PARTITIONS, workers)[group.rank]):
                    accumulator.add(number, inputs[number], 0.1 * inputs[number] if summed.deviations else None)
                nodes = accumulator.nodes()
            together.append(Together(members, nodes, summed))
        own = {name: weight.clone() for name, weight in weights.items()}
        watch = Stopwatch()
        counted = Counted(group, counts.append, watch)
        list(solve_stage(together, own, task, counted, torch.device("cpu"), watch))
        return counts

    result: list[list[int]] = run_group(workers, work)
    return result


def predict(
    stage: list[list[Matrix]], method: Method, pattern: Pattern, partitions: int, workers: int, pace: Pace
) -> Traffic:
    solvers = [[Solver(method, method.options())] * len(group) for group in stage]
    return stage_traffic(stage, [statistic_of(method)] * len(stage), solvers, pattern, partitions, 16, workers, pace)


@pytest.mark.parametrize(
    ("ways", "bytes_per_second"), [("split", 1e3), ("split", math.inf), ("dealt", math.inf), ("apart", math.inf)]
)
@pytest.mark.parametrize("workers", [2, 3, 4])
@pytest.mark.parametrize("pattern", [Unstructured(Fraction(1, 2)), NM(2, 4)], ids=str)
@pytest.mark.parametrize("method", EACH_KIND)
def test_predicted_and_measured_bytes_agree(
    run_group: Any,
    method: str,
    pattern: Pattern,
    workers: int,
    bytes_per_second: float,
    ways: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pace = Pace(exchange_seconds=0.0 if ways == "split" else 1e9, bytes_per_second=bytes_per_second)
    monkeypatch.setattr("billhook.layerworkers.scratch.BAND_BYTES", 10_000)
    table = method_named(method)
    matrices = [Matrix(rows, COLUMNS, 2) for rows in ROWS.values()]
    stage = [[matrix] for matrix in matrices] if ways == "apart" else [matrices]
    partitions = PARTITIONS if table.statistic else 0
    predicted = predict(stage, table, pattern, partitions, workers, pace)
    counts = moved(run_group, workers, method, pattern, pace, ways == "apart")
    measured = sum(map(sum, counts))
    if table.adaptive:  # what is predicted is the most
        assert measured <= predicted.moved_bytes
        assert max(map(len, counts)) <= predicted.exchanges
        return
    assert predicted.moved_bytes == pytest.approx(measured, rel=0.01)
    assert predicted.exchanges == max(map(len, counts))
    assert measured / workers <= predicted.busiest_bytes <= measured


def test_nothing_moves_between_one_worker(run_group: Any) -> None:
    matrices = [Matrix(rows, COLUMNS, 2) for rows in ROWS.values()]
    table, pattern = METHODS["sparsegpt"], Unstructured(Fraction(1, 2))
    predicted = predict([matrices], table, pattern, PARTITIONS, 1, Pace())
    assert predicted.moved_bytes == sum(map(sum, moved(run_group, 1, "sparsegpt", pattern, Pace()))) == 0


def test_nothing_moves_twice_for_rows_that_are_left_alone(run_group: Any) -> None:
    matrices = [Matrix(rows, COLUMNS, 2) for rows in ROWS.values()]
    table, pattern = METHODS["wanda"], Unstructured(Fraction(0))
    predicted = predict([matrices], table, pattern, PARTITIONS, 3, Pace())
    assert predicted.moved_bytes == sum(map(sum, moved(run_group, 3, "wanda", pattern, Pace())))


def test_the_nodes_of_a_range_are_those_that_folding_leaves() -> None:
    for start in range(9):
        for stop in range(start, 20):
            nodes = fold(Node(0, index, torch.zeros(1)) for index in range(start, stop))
            assert node_count(start, stop) == len(nodes)
