"""The same bytes for any number of workers, without Ray: threads stand for workers."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch

from billhook.layerworkers.methods import METHODS
from billhook.layerworkers.patterns import NM, Pattern, Unstructured
from billhook.layerworkers.reduction import even_ranges
from billhook.layerworkers.solving import Solved, solve_group
from billhook.layerworkers.tasks import BlockTask, LinearTask

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


def solved_by(workers: int, run_group: Any, method: str, pattern: Pattern, dtype: torch.dtype) -> list[list[Solved]]:
    weights, inputs = problem(dtype)
    table = METHODS[method]
    tasks = [LinearTask(name, name, pattern, method, table.options()) for name in weights]
    partitions = 0 if table.statistic is None else 6
    task = BlockTask(0, (), (), tuple(tasks), "lockstep", "", 4, partitions, 16)
    numbered = list(enumerate(inputs))

    def work(group: Any) -> list[Solved]:
        start, stop = even_ranges(partitions, group.size)[group.rank]
        return solve_group(tasks, weights, numbered[start * 4 : stop * 4], task, group, torch.device("cpu"))

    results: list[list[Solved]] = run_group(workers, work)
    return results


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("pattern", [Unstructured(Fraction(1, 2)), NM(2, 4)])
@pytest.mark.parametrize("ways", ["split", "dealt"])
def test_any_number_of_workers_gives_the_same_bytes(
    run_group: Any, method: str, pattern: Pattern, ways: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cost = 0.0 if ways == "split" else 1e9
    monkeypatch.setattr("billhook.layerworkers.sharing.SECONDS_PER_EXCHANGE", cost)
    (reference,) = solved_by(1, run_group, method, pattern, torch.bfloat16)
    for workers in (2, 3, 5):
        for each in solved_by(workers, run_group, method, pattern, torch.bfloat16):
            assert [solved.report for solved in each] == [solved.report for solved in reference]
            for one, other in zip(each, reference, strict=True):
                assert torch.equal(one.weight.view(torch.int16), other.weight.view(torch.int16))


def test_zeros_are_positive_and_counted_as_written(run_group: Any) -> None:
    (solved,) = solved_by(1, run_group, "wanda", NM(2, 4), torch.float16)
    for each in solved:
        zero = each.weight == 0
        assert not (zero & torch.signbit(each.weight)).any()
        assert each.report.zeros == int(zero.sum()) == each.report.removed == each.weight.numel() // 2
        assert each.weight.dtype == torch.float16


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_mask_methods_keep_float64_survivors_to_the_last_bit(run_group: Any, method: str) -> None:
    weights, inputs = problem(torch.float32)
    dense = {name: weight.double() / 3 for name, weight in weights.items()}
    table = METHODS[method]
    tasks = [LinearTask(name, name, NM(2, 4), method, table.options()) for name in dense]
    task = BlockTask(0, (), (), tuple(tasks), "lockstep", "", 4, 6 if table.statistic else 0, 16)
    numbered = list(enumerate(inputs))
    (solved,) = run_group(1, lambda group: solve_group(tasks, dense, numbered, task, group, torch.device("cpu")))
    for each in solved:
        kept = each.weight != 0
        assert torch.equal(each.weight[kept], dense[each.report.name][kept])


@pytest.mark.parametrize("method", list(METHODS))
def test_nothing_asked_is_nothing_changed(run_group: Any, method: str) -> None:
    weights, _ = problem(torch.bfloat16)
    (solved,) = solved_by(1, run_group, method, Unstructured(Fraction(0)), torch.bfloat16)
    for each in solved:
        assert torch.equal(each.weight, weights[each.report.name])
