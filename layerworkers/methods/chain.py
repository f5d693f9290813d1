"""A method followed by refinements of its result, as one method: ``wanda+swaps+refit``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from billhook.layerworkers.collective import Load
from billhook.layerworkers.errors import OptionError
from billhook.layerworkers.methods.contract import Alternation, Method, Refinement, Rounds, Solution
from billhook.layerworkers.patterns import Selector
from billhook.layerworkers.problem import LinearProblem
from billhook.layerworkers.statistics import Statistic, covering


def chain(first: Method, refinements: Sequence[Refinement]) -> Method:
    """Return the method that solves by ``first`` and passes the result through ``refinements``.

    Its options are those of all parts; one that several have is one and the same, with the default of the earliest.

    Raises:
        InputError: when no statistic answers what all parts ask.
    """
    parts: list[Method | Refinement] = [first, *refinements]
    name = "+".join(part.name for part in parts)

    def solve(weight_RC: Tensor, problem: LinearProblem, select: Selector, options: Any) -> Solution:
        dense_RC = weight_RC.clone()
        solution = first.solve(weight_RC, problem, select, _of(first, options))
        for each in refinements:
            solution = each.refine(dense_RC, solution, problem, select.pattern, _of(each, options))
        return solution

    rounds_of: Callable[[Any], Rounds] = first.rounds or (lambda options: Rounds(0, 0, 0.0))
    samples_of: Callable[[Any], int] = first.model_gradients or (lambda options: 0)
    alternation_of: Callable[[Any], Alternation] = first.alternation or (lambda options: Alternation(0))
    forms = frozenset[str]().union(*(part.forms for part in parts))
    return dataclasses.replace(
        first,
        name=name,
        source="; ".join(part.source for part in parts),
        summary="; then ".join(part.summary for part in parts),
        statistic=_covering(name, [part.statistic for part in parts if part.statistic is not None]),
        fit=[part.fit for part in parts if part.fit][-1],
        options=_options(parts),
        solve=solve,
        selections=lambda columns, options: first.selections(columns, _of(first, options)),
        counts=lambda columns, options: first.counts(columns, _of(first, options)),
        rounds=None if first.rounds is None else lambda options: rounds_of(_of(first, options)),
        model_gradients=None if first.model_gradients is None else lambda options: samples_of(_of(first, options)),
        alternation=None if first.alternation is None else lambda options: alternation_of(_of(first, options)),
        flops=lambda rows, columns, options: sum(part.flops(rows, columns, _of(part, options)) for part in parts),
        launches=lambda columns, options: sum(part.launches(columns, _of(part, options)) for part in parts),
        factor_flops=lambda columns: sum(part.factor_flops(columns) for part in parts),
        shared=lambda columns: sum((part.shared(columns) for part in _asking(parts)), start=Load(())),
        extra_bytes=lambda rows, columns: (
            4 * rows * columns
            + sum(part.extra_bytes(rows, columns) for part in parts)
            + 4 * columns**2 * max(0, len(forms) - 1)
        ),
        forms=forms,
    )


def _asking(parts: Sequence[Method | Refinement]) -> list[Method | Refinement]:
    """Return the parts without those for which another one has had the Gram made into the same form."""
    return [part for number, part in enumerate(parts) if not any(part.forms & other.forms for other in parts[:number])]


def _of(part: Method | Refinement, options: Any) -> Any:
    """Return a part's own options, out of the chain's."""
    return part.options(**{field.name: getattr(options, field.name) for field in dataclasses.fields(part.options)})


def _options(parts: Sequence[Method | Refinement]) -> type[Any]:
    fields = dict[str, Any]()
    for part in parts:
        for field in dataclasses.fields(part.options):
            fields.setdefault(field.name, (field.name, field.type, field.default))

    def check(self: Any) -> None:
        for part in parts:
            _of(part, self)

    made: type[Any] = dataclasses.make_dataclass(
        "Options", fields.values(), frozen=True, namespace={"__post_init__": check}
    )
    return made


def _covering(name: str, statistics: Sequence[Statistic]) -> Statistic | None:
    if (found := covering(statistics)) is not None:
        return found
    if statistics:
        needs = ", ".join(dict.fromkeys(each.name for each in statistics))
        raise OptionError(f"--method {name}: its parts need different statistics ({needs}), and none gives them all")
    return None
