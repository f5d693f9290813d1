"""billhook's Python interface: what must be done, in what order, what is done.

``prune``, ``plan``, ``evaluate``, ``verify`` and ``inspect`` do what the commands of the same names do (``evaluate``
is ``billhook eval``); they raise :class:`InputError` where the command line exits with 2 and :class:`RunError` where
it exits with 1. They are imported on first use, so that importing this package does not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from billhook.layerworkers.errors import InputError, RunError

if TYPE_CHECKING:
    from billhook.orchestrator.driver import PruneResult, prune
    from billhook.orchestrator.evaluation import Evaluation, evaluate
    from billhook.orchestrator.inspection import Inspection, inspect
    from billhook.orchestrator.planning import Plan, plan
    from billhook.orchestrator.verification import Verification, verify

_HOMES = {
    "prune": "driver",
    "PruneResult": "driver",
    "evaluate": "evaluation",
    "Evaluation": "evaluation",
    "inspect": "inspection",
    "Inspection": "inspection",
    "plan": "planning",
    "Plan": "planning",
    "verify": "verification",
    "Verification": "verification",
}

__all__ = [
    "Evaluation",
    "InputError",
    "Inspection",
    "Plan",
    "PruneResult",
    "RunError",
    "Verification",
    "evaluate",
    "inspect",
    "plan",
    "prune",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
