"""Pruning methods: one file each, with one function that solves a linear, and one line in :data:`METHODS`.

A method is ``solve(weight_RC, problem, select, options) -> Solution``. ``weight_RC`` [R, C] float32 holds the rows of
a linear that this worker solves; they are its own to overwrite. ``problem`` answers questions about the linear's
input; ``select`` chooses entries. Both are collective: every worker that holds rows of the linear makes the same calls
in the same order. Products go through ``matmul_by_rows``, so that the bits of a row do not depend on its neighbours.

A refinement is ``refine(dense_RC, solution, problem, pattern, options) -> Solution``, and stands in
:data:`REFINEMENTS`. Other packages add to both tables by entry points of the group :data:`PLUGINS`.
"""

from __future__ import annotations

import functools
from importlib.metadata import entry_points
from typing import Any

from billhook.layerworkers.errors import OptionError, nearest
from billhook.layerworkers.methods.admm import ADMM
from billhook.layerworkers.methods.alps import ALPS
from billhook.layerworkers.methods.auto import AUTO
from billhook.layerworkers.methods.chain import chain
from billhook.layerworkers.methods.collect import COLLECT
from billhook.layerworkers.methods.contract import Alternation, Method, Refinement, Rounds, Solution, Solver
from billhook.layerworkers.methods.dsnot import DSNOT
from billhook.layerworkers.methods.gblm import GBLM
from billhook.layerworkers.methods.iht import IHT
from billhook.layerworkers.methods.magnitude import MAGNITUDE
from billhook.layerworkers.methods.net_trim import NET_TRIM
from billhook.layerworkers.methods.refit import EXACT_REFIT, REFIT
from billhook.layerworkers.methods.ria import RIA
from billhook.layerworkers.methods.sparse_llm import SPARSE_LLM
from billhook.layerworkers.methods.sparsegpt import SPARSEGPT
from billhook.layerworkers.methods.swaps import SWAPS
from billhook.layerworkers.methods.thanos import THANOS
from billhook.layerworkers.methods.wanda import WANDA, WANDA_CUMULATIVE
from billhook.layerworkers.methods.wanda_plus_plus import WANDA_PLUS_PLUS

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        *(AUTO, MAGNITUDE, WANDA, WANDA_CUMULATIVE, WANDA_PLUS_PLUS, GBLM, RIA),
        *(SPARSEGPT, SPARSE_LLM, THANOS, NET_TRIM, IHT, ADMM, ALPS),
    )
}

UNLISTED = {COLLECT.name: COLLECT}
"""What is solved by none of these; nobody may ask for it by ``--method``."""

REFINEMENTS: dict[str, Refinement] = {each.name: each for each in (DSNOT, SWAPS, REFIT, EXACT_REFIT)}


PLUGINS = "billhook.methods"
"""Group of entry points, each a :class:`Method` or a :class:`Refinement` of another package."""


def _add_plugins() -> None:
    for point in entry_points(group=PLUGINS):
        try:
            found = point.load()
        except Exception as error:  # whatever another package does when it is imported
            raise OptionError(f"the entry point {point.value} of {PLUGINS} cannot be loaded: {error}") from error
        if not isinstance(found, Method | Refinement):
            raise OptionError(f"the entry point {point.value} of {PLUGINS} is neither a Method nor a Refinement")
        table: dict[str, Any] = METHODS if isinstance(found, Method) else REFINEMENTS
        if found.name in table:
            raise OptionError(f"the entry point {point.value} of {PLUGINS} is called {found.name!r}, as another one is")
        table[found.name] = found


_add_plugins()


@functools.cache
def method_named(name: str) -> Method:
    """Return a method by its name, or a method and refinements by theirs, as ``wanda+swaps+refit``.

    Raises:
        InputError: when there is none of that name, or they do not go together.
    """
    if name in UNLISTED:
        return UNLISTED[name]
    # The name of a method may end in plus signs.
    whole = max((each for each in METHODS if name == each or name.startswith(f"{each}+")), key=len, default="")
    first, *others = [whole, *name[len(whole) + 1 :].split("+")] if whole else name.split("+")
    others = others if name != whole else []
    if first not in METHODS:
        raise OptionError(f"--method {name}: unknown{nearest(first, [*METHODS])}; known are {', '.join(METHODS)}")
    for other in others:
        if other not in REFINEMENTS:
            raise OptionError(
                f"--method {name}: {other!r} cannot follow a method{nearest(other, [*REFINEMENTS])}; what can is "
                f"{', '.join(REFINEMENTS)}"
            )
    return chain(METHODS[first], [REFINEMENTS[other] for other in others]) if others else METHODS[first]


__all__ = [
    "COLLECT",
    "METHODS",
    "REFINEMENTS",
    "UNLISTED",
    "Alternation",
    "Method",
    "Refinement",
    "Rounds",
    "Solution",
    "Solver",
    "method_named",
]
