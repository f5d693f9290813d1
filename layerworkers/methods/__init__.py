"""Pruning methods: one file each, with one function that solves a linear, and one line in :data:`METHODS`.

A method is ``solve(weight_RC, problem, select, options) -> Solution``. ``weight_RC`` [R, C] float32 holds the rows of
a linear that this worker solves; they are its own to overwrite. ``problem`` answers questions about the linear's
input; ``select`` chooses entries. Both are collective: every worker that holds rows of the linear makes the same calls
in the same order. Products go through ``matmul_by_rows``, so that the bits of a row do not depend on its neighbours.
"""

from __future__ import annotations

from billhook.layerworkers.methods.admm import ADMM
from billhook.layerworkers.methods.contract import Method, Solution
from billhook.layerworkers.methods.magnitude import MAGNITUDE
from billhook.layerworkers.methods.sparsegpt import SPARSEGPT
from billhook.layerworkers.methods.wanda import WANDA

METHODS: dict[str, Method] = {method.name: method for method in (MAGNITUDE, WANDA, SPARSEGPT, ADMM)}

__all__ = ["METHODS", "Method", "Solution"]
