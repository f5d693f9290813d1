"""Metrics of a run for those who watch many: TensorBoard, trackio and Weights & Biases, on request."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from billhook.layerworkers.errors import OptionError
from billhook.orchestrator.events import (
    BlockDone,
    Event,
    Progress,
    RunFinished,
    Warned,
    errors_by_kind,
    sparsity_of,
)
from billhook.orchestrator.journal import FOLDER

PROJECT = "billhook"
"""Name under which trackio and wandb file runs, where their own settings do not say."""

Log = Callable[[Mapping[str, float], int], None]
"""``log(values, step)``: the step is a block's index."""


def check_installed(tools: Sequence[str]) -> None:
    """Check that the tools are there.

    Raises:
        InputError: when one is not: what to install is named.
    """
    for tool in tools:
        if find_spec(tool) is None:
            raise OptionError(f"--log-to {tool}: the package {tool} is not installed; install it: pip install {tool}")


@contextmanager
def metrics_logged(
    tools: Sequence[str], output: Path, about: Mapping[str, Any], report: Progress
) -> Iterator[Progress]:
    """Yield a listener that passes each block's metrics on to ``tools``, keys of :data:`TOOLS`.

    about: what the run is, as plain JSON values. report: is warned of a tool that fails, which is then told no more.

    Raises:
        InputError: when one cannot be begun with.
    """
    with ExitStack() as stack:
        logs: dict[str, Log] = {}
        for tool in tools:
            try:
                logs[tool] = stack.enter_context(TOOLS[tool](output, about))
            except Exception as error:  # whatever another package does
                raise OptionError(f"--log-to {tool}: cannot begin: {' '.join(str(error).split())}") from error

        def listen(event: Event) -> None:
            if not isinstance(event, BlockDone | RunFinished):
                return
            for tool in [*logs]:
                try:
                    logs[tool](*metrics_of(event))
                except Exception as error:  # a run of days does not end for that
                    del logs[tool]
                    report(Warned(f"--log-to {tool}: failed and is told no more: {error}"))

        yield listen


def metrics_of(event: BlockDone | RunFinished) -> tuple[dict[str, float], int]:
    """Return what is logged of an event, by name, and its step: a block's index."""
    peaks = {f"peak_bytes/{tier}": float(size) for tier, size in event.peak_bytes.items()}
    if isinstance(event, RunFinished):
        return {"run/seconds": event.seconds, "run/sparsity": event.sparsity, **peaks}, max(0, event.blocks - 1)
    values = {
        "block/seconds": event.seconds,
        "block/blocks_per_hour": 3600 / event.seconds if event.seconds else math.inf,
        "block/moved_bytes": float(event.moved_bytes),
        **{f"seconds/{part}": seconds for part, seconds in event.parts_seconds.items()},
        **peaks,
    }
    if event.linears:
        values |= {
            "block/sparsity": sparsity_of(event.linears),
            "block/largest_error": max(linear.error for linear in event.linears),
            "block/raised_dampings": float(sum(len(linear.dampings) > 1 for linear in event.linears)),
            **{f"error/{kind}": error for kind, error in errors_by_kind(event.linears).items()},
        }
    return values, event.index


@contextmanager
def _tensorboard(output: Path, about: Mapping[str, Any]) -> Iterator[Log]:
    """Write into the run's own folder."""
    from torch.utils.tensorboard import SummaryWriter

    writer: Any = SummaryWriter(str(output / FOLDER / "tensorboard"))

    def log(values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    try:
        writer.add_text("run", f"```json\n{json.dumps(about, indent=1)}\n```")
        yield log
    finally:
        writer.close()


@contextmanager
def _trackio(output: Path, about: Mapping[str, Any]) -> Iterator[Log]:
    """Write where trackio keeps its runs on this machine; it sends them on where its own settings say so."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # what it shows its pages with would report home
    import trackio

    trackio.init(os.environ.get("TRACKIO_PROJECT", PROJECT), name=output.name, config=dict(about))
    try:
        yield lambda values, step: trackio.log(dict(values), step=step)
    finally:
        trackio.finish()


@contextmanager
def _wandb(output: Path, about: Mapping[str, Any]) -> Iterator[Log]:
    """Log as wandb's own settings say; with ``WANDB_MODE=offline`` into the run's folder."""
    import wandb

    project = os.environ.get("WANDB_PROJECT", PROJECT)
    run = wandb.init(project=project, name=output.name, config=dict(about), dir=str(output / FOLDER))
    try:
        yield lambda values, step: run.log(dict(values), step=step)
    finally:
        run.finish()


TOOLS = {"tensorboard": _tensorboard, "trackio": _trackio, "wandb": _wandb}
"""What ``--log-to`` takes."""
