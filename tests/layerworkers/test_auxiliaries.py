"""SparseLLM's auxiliaries: each move makes the objective smaller, and the sums do not depend on who adds them."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from billhook.layerworkers.auxiliaries import Auxiliaries, Network, alternate, before_relu, moved, output_inverse
from billhook.layerworkers.collective import Alone, Collective
from billhook.layerworkers.errors import OptionError
from billhook.layerworkers.feed_forward import FeedForward, Made, Pointwise
from billhook.layerworkers.methods import METHODS, Alternation, method_named
from billhook.layerworkers.patterns import NM, Pattern, Unstructured
from billhook.layerworkers.problem import LinearProblem
from billhook.layerworkers.reduction import Node, even_ranges, total
from billhook.layerworkers.solving import Together, solve_stage
from billhook.layerworkers.statistics import Accumulator, Statistic, with_deviations
from billhook.layerworkers.stopwatch import Stopwatch
from billhook.layerworkers.tasks import BlockTask, LinearTask

CPU = torch.device("cpu")
SAMPLES, TOKENS, WIDTH, BETWEEN = 6, 40, 16, 24
ATEN = torch.ops.aten
PLAIN = {
    name: FeedForward("", "up", "down", Pointwise(((function, (Made(-1),), {}),)))
    for name, function in {"relu": ATEN.relu.default, "gelu": ATEN.gelu.default}.items()
}
GATED = FeedForward(
    "gate",
    "up",
    "down",
    Pointwise(((ATEN.silu.default, (Made(-1),), {}), (ATEN.mul.Tensor, (Made(0), Made(-2)), {}))),
)
FORMS = {**PLAIN, "gated": GATED}
HOW = Alternation(3, 2.0, 0.7, 1.3, 0.05)


def network(form: FeedForward) -> tuple[Network, list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shapes = {**dict.fromkeys(form.linears[:-1], (BETWEEN, WIDTH)), form.down: (WIDTH, BETWEEN)}
    dense = {name: torch.randn(shape, generator=generator) / shape[1] ** 0.5 for name, shape in shapes.items()}
    sparse = {name: weight * (weight.abs() > weight.abs().median()) for name, weight in dense.items()}
    biases = {name: torch.randn(shape[0], generator=generator) for name, shape in shapes.items()}
    inputs = [torch.randn(1, TOKENS, WIDTH, generator=generator) for _ in range(SAMPLES)]
    return Network(form, dense, sparse, biases), inputs


def between(form: FeedForward, up: Tensor, gate: Tensor | None) -> Tensor:
    return form.activation(up) if gate is None else form.activation(gate) * up


@pytest.mark.parametrize("name", FORMS)
def test_each_move_makes_the_objective_smaller(name: str) -> None:
    form = FORMS[name]
    made, inputs = network(form)
    x = torch.cat([each[0] for each in inputs])

    def outputs(weights: Any) -> tuple[Tensor, Tensor | None]:
        up = functional.linear(x, weights["up"], made.biases["up"])
        return up, functional.linear(x, weights["gate"], made.biases["gate"]) if form.gate else None

    dense_up, dense_gate = outputs(made.dense)
    target = functional.linear(between(form, dense_up, dense_gate), made.dense["down"])
    up, gate = outputs(made.sparse)
    down = made.sparse["down"]

    def objective(p: Tensor, z: Tensor, s: Tensor | None) -> float:
        first = (up - z).square().sum() + (0.0 if s is None or gate is None else (gate - s).square().sum())
        last = HOW.beta * (p @ down.T - target).square().sum()
        return float(HOW.alpha * first + HOW.gamma * (p - between(form, z, s)).square().sum() + last)

    z, s, p = dense_up, dense_gate, between(form, dense_up, dense_gate)
    values = [objective(p, z, s)]
    for _ in range(4):
        p, new_z, new_s = moved(form, down, output_inverse(down, HOW), target, up, gate, z, s, HOW)
        values += [objective(p, z, s), objective(p, new_z, s), objective(p, new_z, new_s)]
        z, s = new_z, new_s
    assert all(after <= before * (1 + 1e-6) for before, after in pairwise(values))
    assert values[-1] < 0.8 * values[0]


def test_what_enters_the_last_linear_is_the_authors_solution() -> None:
    made, _ = network(GATED)
    down, target = made.sparse["down"], torch.randn(TOKENS, WIDTH)
    up, gate = torch.randn(2, TOKENS, BETWEEN)
    p, _, _ = moved(GATED, down, output_inverse(down, HOW), target, up, gate, up, gate, HOW)
    inverse = torch.linalg.inv(HOW.beta * down.T @ down + HOW.gamma * torch.eye(BETWEEN))
    right = HOW.beta * target @ down + HOW.gamma * functional.silu(gate) * up
    torch.testing.assert_close(p, right @ inverse, rtol=1e-4, atol=1e-4)


def test_before_a_rectifier_no_other_number_is_better() -> None:
    output, hidden = torch.randn(2, 400, generator=torch.Generator().manual_seed(3))
    grid = torch.linspace(-4, 4, 4001)[:, None]

    def errors(z: Tensor) -> Tensor:
        return HOW.alpha * (z - output).square() + HOW.gamma * (hidden - z.relu()).square()

    found = before_relu(output, hidden, HOW)
    assert (errors(found) <= errors(grid).amin(dim=0) + 1e-6).all()
    assert (found < 0).any()
    assert (found > 0).any()


def test_refitted_linears_are_those_of_least_squares() -> None:
    made, inputs = network(PLAIN["gelu"])
    dense, bias = made.dense["up"], made.biases["up"]
    aims = [functional.linear(x[0], dense, bias) + 0.3 * torch.randn(TOKENS, BETWEEN) for x in inputs]
    sums = Accumulator(with_deviations(BETWEEN), WIDTH, 2, CPU)
    for number, (x, aim) in enumerate(zip(inputs, aims, strict=True)):
        sums.add(number, x, aim - functional.linear(x[0], dense, bias))

    def fitted(ridge: float) -> Tensor:
        problem = LinearProblem(total(sums_nodes(), 3).clone(), WIDTH, 8, Alone(), CPU)
        return problem.corrected(dense, 0, 1.0, of_output=True, ridge=ridge)

    nodes = sums.nodes()

    def sums_nodes() -> list[Node]:
        return [Node(node.level, node.index, node.total.clone(), node.partitions) for node in nodes]  # type: ignore[union-attr]

    best = torch.linalg.lstsq(torch.cat([x[0] for x in inputs]), torch.cat(aims) - bias).solution.T
    torch.testing.assert_close(fitted(1e-9), best, rtol=1e-3, atol=1e-4)
    assert (fitted(0.1) - dense).norm() < (fitted(1e-9) - dense).norm()


def in_turns(form: FeedForward, pattern: Pattern, group: Collective, how: Alternation = HOW) -> dict[str, Tensor]:
    """The linears of a network in the end, each worker having its share of the samples."""
    made, inputs = network(form)
    first, last = even_ranges(SAMPLES, group.size)[group.rank]
    options = METHODS["sparsellm"].options()
    weights = dict(made.sparse)
    tasks = {name: LinearTask(name, name, pattern, "sparsellm", options, correction=1.0) for name in form.linears}
    task = BlockTask(0, (), (), tuple(tasks.values()), "lockstep", "", 1, SAMPLES, 8)

    def refit(name: str, statistic: Statistic, nodes: list[Node]) -> None:
        together = Together([tasks[name]], nodes, statistic, of_output=True, ridge=how.ridge)
        weights[name] = made.dense[name].clone()
        for report in solve_stage([together], weights, task, group, CPU, Stopwatch()):
            assert report.removed == weights[name].numel() // 2

    auxiliaries = Auxiliaries(inputs[first:last], [], [], [])
    changing = Network(form, made.dense, weights, made.biases)
    with torch.inference_mode():
        alternate(changing, auxiliaries, range(first, last), 1, how, refit, CPU, None)
    return weights


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("pattern", [Unstructured(Fraction(1, 2)), NM(2, 4)], ids=str)
def test_no_bit_depends_on_the_number_of_workers(name: str, pattern: Pattern, run_group: Any) -> None:
    def work(group: Collective) -> dict[str, Tensor]:
        return in_turns(FORMS[name], pattern, group)

    (alone,) = run_group(1, work)
    for workers in (2, 3):
        for found in run_group(workers, work):
            assert all(torch.equal(found[each], alone[each]) for each in alone)


@pytest.mark.parametrize("name", FORMS)
def test_turns_bring_the_output_nearer_to_the_dense_one(name: str) -> None:
    form = FORMS[name]
    made, inputs = network(form)

    def error(weights: Any) -> float:
        total = 0.0
        for x in inputs:
            made_of = []
            for each in (made.dense, weights):
                outputs = [functional.linear(x, each[linear], made.biases[linear]) for linear in form.linears[:-1]]
                hidden = between(form, outputs[-1], outputs[0] if form.gate else None)
                made_of.append(functional.linear(hidden, each["down"]))
            total += float((made_of[0] - made_of[1]).square().sum())
        return total

    pattern = Unstructured(Fraction(1, 2))
    once = error(in_turns(form, pattern, Alone(), Alternation(1)))
    assert once < error(made.sparse)
    still = in_turns(form, pattern, Alone(), Alternation(0))
    assert all(torch.equal(still[linear], made.sparse[linear]) for linear in form.linears)


def test_a_chain_alternates_as_its_method_does() -> None:
    chained = method_named("sparsellm+refit")
    asked: Callable[[Any], Alternation] | None = chained.alternation
    assert asked is not None
    assert asked(chained.options(epochs=2, beta=3.0)) == Alternation(2, 1.0, 3.0, 1.0, 0.001)
    assert METHODS["sparsegpt"].alternation is None


@pytest.mark.parametrize(
    "options", [{"epochs": -1}, {"alpha": 0.0}, {"gamma": -1.0}, {"ridge": -0.1}, {"damping": 0.0}]
)
def test_options_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(options))):
        METHODS["sparsellm"].options(**options)
