"""Tasks of lm-evaluation-harness on a checkpoint. The harness holds the whole model: nothing is streamed here."""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch

from billhook.layerworkers.errors import BudgetError, OptionError, nearest
from billhook.orchestrator.budgets import Budgets, resolve_budgets
from billhook.orchestrator.model import Model, open_model
from billhook.orchestrator.paths import user_path
from billhook.orchestrator.recipe import RunOptions, read_options
from billhook.orchestrator.units import gibibytes


@dataclass(frozen=True)
class Tasks:
    """Tasks that can be run on a checkpoint, as far as can be told beforehand."""

    model: Model
    names: tuple[str, ...]
    manager: Any
    """The harness's own table of tasks."""


def evaluate_tasks(
    checkpoint: str | Path,
    tasks: Sequence[str],
    *,
    task_folder: str | Path | None = None,
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    vram: int | str | None = None,
    ram: int | str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, dict[str, float]]:
    """Run tasks of lm-evaluation-harness (``lm_eval``, extra ``tasks``) on a checkpoint; return each task's metrics.

    tasks: names of tasks, groups or tags; the harness fetches the datasets that they name. task_folder: holds tasks of
    your own, as the harness's YAML files, whose Python functions are run. vram, ram: what the weights must fit.

    Raises:
        InputError: the harness is not installed, does not know a task, or the model does not fit.
    """
    return run_tasks(
        prepare_tasks(
            checkpoint,
            tasks,
            task_folder=task_folder,
            dtype=dtype,
            device=device,
            vram=vram,
            ram=ram,
            trust_remote_code=trust_remote_code,
        )
    )


def prepare_tasks(
    checkpoint: str | Path,
    tasks: Sequence[str],
    *,
    task_folder: str | Path | None = None,
    dtype: str = "auto",
    device: str = "auto",
    vram: int | str | None = None,
    ram: int | str | None = None,
    trust_remote_code: bool = False,
) -> Tasks:
    """Check all of a request that can be checked before anything is run; see :func:`evaluate_tasks`."""
    names = tuple(name.strip() for name in tasks if name.strip())
    if not names:
        raise OptionError("--tasks: names no task; give some, as --tasks arc_easy,piqa")
    folder = None if task_folder is None else user_path(task_folder)
    if folder is not None and not folder.is_dir():
        raise OptionError(f"--task-folder {task_folder}: there is no such folder")
    _, resources = read_options(None, cast(RunOptions, {"vram": vram, "ram": ram}))
    model = open_model(checkpoint, device, dtype, trust_remote_code)
    _check_room(model, resolve_budgets(resources.vram, resources.ram, None, model.device, None))
    try:
        with contextlib.redirect_stdout(sys.stderr):  # ours is for results
            from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise OptionError(
            f"--tasks: lm-evaluation-harness cannot be imported ({error}); install it with 'pip install lm_eval', or "
            "billhook with its extra 'tasks'"
        ) from error
    with contextlib.redirect_stdout(sys.stderr):
        manager: Any = None
        if folder is not None:  # the harness's own are thousands of files to look through
            manager = TaskManager(include_path=str(folder), include_defaults=False)
        if manager is None or not set(names) <= set(manager.all_tasks):
            manager = TaskManager(include_path=None if folder is None else str(folder))
    known = [str(each) for each in manager.all_tasks]
    for name in names:
        if name not in known:
            raise OptionError(f"--tasks {name}: lm-evaluation-harness has no such task{nearest(name, known)}")
    return Tasks(model, names, manager)


def run_tasks(tasks: Tasks) -> dict[str, dict[str, float]]:
    """Run tasks; return the metrics of each, and their standard errors, by the harness's names."""
    model = tasks.model
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the harness forks, of which tokenizers complain
    with contextlib.redirect_stdout(sys.stderr):
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        loaded: Any = HFLM(
            str(model.checkpoint.folder),
            dtype=model.dtype,
            device=model.device,
            trust_remote_code=model.trust_remote_code,
        )
        found: Any = simple_evaluate(loaded, tasks=list(tasks.names), task_manager=tasks.manager)
    return {
        task: {metric: float(value) for metric, value in metrics.items() if isinstance(value, int | float)}
        for task, metrics in found["results"].items()
    }


def _check_room(model: Model, budgets: Budgets) -> None:
    """Check that the whole model fits, as the harness loads it."""
    item = getattr(torch, model.dtype).itemsize
    size = sum(item * math.prod(entry.shape) for entry in model.checkpoint.tensors.values())
    option, room = ("vram", budgets.vram) if budgets.vram is not None else ("ram", budgets.ram)
    if size > room:
        raise BudgetError(
            f"--tasks: the harness holds the whole model, {gibibytes(size)} in {model.dtype}, more than --{option} "
            f"{gibibytes(room)}; --text and --against measure it a block at a time"
        )
