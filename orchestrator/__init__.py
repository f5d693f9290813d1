"""billhook's Python interface: what must be done, in what order, what is done.

``prune``, ``plan``, ``collect``, ``solve``, ``allocate``, ``status``, ``report``, ``evaluate``, ``verify`` and
``inspect`` do what the commands of the same names do (``evaluate`` and ``evaluate_tasks`` are ``billhook eval``,
``resume`` is ``billhook prune --resume``). They raise :class:`InputError` where the command line exits with 2,
:class:`RunError` with 1, and :class:`Interrupted` where it exits with 130; all are :class:`BillhookError` and have a
``code``, a ``cause`` and a ``remedy``. ``progress=`` takes a function that is told of every :class:`Event`, such as
``print``, or what :func:`shown_progress` gives. They are imported on first use, so that importing this package does not
import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from billhook.layerworkers.errors import BillhookError, InputError, Interrupted, RunError

if TYPE_CHECKING:
    from billhook.orchestrator.allocating import allocate
    from billhook.orchestrator.allocation import Allocation
    from billhook.orchestrator.driver import CollectResult, PruneResult, collect, prune, resume, solve
    from billhook.orchestrator.evaluation import Comparison, Evaluation, evaluate
    from billhook.orchestrator.event_log import read_events
    from billhook.orchestrator.events import Event
    from billhook.orchestrator.harness import evaluate_tasks
    from billhook.orchestrator.inspection import Inspection, inspect
    from billhook.orchestrator.planning import Plan, plan
    from billhook.orchestrator.progress import shown_progress
    from billhook.orchestrator.reporting import Report, report
    from billhook.orchestrator.run_status import Status, status
    from billhook.orchestrator.verification import Verification, verify

_HOMES = {
    "allocate": "allocating",
    "Allocation": "allocation",
    "collect": "driver",
    "CollectResult": "driver",
    "prune": "driver",
    "solve": "driver",
    "resume": "driver",
    "PruneResult": "driver",
    "evaluate": "evaluation",
    "Evaluation": "evaluation",
    "Event": "events",
    "read_events": "event_log",
    "shown_progress": "progress",
    "Comparison": "evaluation",
    "evaluate_tasks": "harness",
    "inspect": "inspection",
    "Inspection": "inspection",
    "plan": "planning",
    "Plan": "planning",
    "report": "reporting",
    "Report": "reporting",
    "status": "run_status",
    "Status": "run_status",
    "verify": "verification",
    "Verification": "verification",
}

__all__ = [
    "Allocation",
    "BillhookError",
    "CollectResult",
    "Comparison",
    "Evaluation",
    "Event",
    "InputError",
    "Inspection",
    "Interrupted",
    "Plan",
    "PruneResult",
    "Report",
    "RunError",
    "Status",
    "Verification",
    "allocate",
    "collect",
    "evaluate",
    "evaluate_tasks",
    "inspect",
    "plan",
    "prune",
    "read_events",
    "report",
    "resume",
    "shown_progress",
    "solve",
    "status",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
