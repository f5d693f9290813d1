"""Allocation: how much of each linear is removed, so that the whole loses what was asked.

An allocator says how sparse each linear should be; :func:`billhook.orchestrator.allocation.budget.to_budget` makes
counts of it that add up.
"""

from __future__ import annotations

from billhook.orchestrator.allocation.allocators import ALLOCATORS, UNIFORM
from billhook.orchestrator.allocation.budget import Matrix, to_budget
from billhook.orchestrator.allocation.contract import Allocator, Candidate, Evidence
from billhook.orchestrator.allocation.table import (
    Allocation,
    allocated,
    check_allocator,
    read_allocation,
    tabled,
    write_allocation,
)

__all__ = [
    "ALLOCATORS",
    "UNIFORM",
    "Allocation",
    "Allocator",
    "Candidate",
    "Evidence",
    "Matrix",
    "allocated",
    "check_allocator",
    "read_allocation",
    "tabled",
    "to_budget",
    "write_allocation",
]
