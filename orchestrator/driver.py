"""Prune a model: block after block through the workers into the output, from wherever the journal says."""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

from billhook.cluster.session import check_dashboard, remove_leftovers
from billhook.layerworkers.descriptors import disk_failure
from billhook.layerworkers.errors import InputError, Interrupted, NoRunError, OtherPlanError, RunError
from billhook.layerworkers.tasks import LinearReport
from billhook.orchestrator import output as out
from billhook.orchestrator.allocating import allocated, store, windows_of
from billhook.orchestrator.block_loop import Run, commit_blocks
from billhook.orchestrator.budgets import Budgets
from billhook.orchestrator.calibration import Windows
from billhook.orchestrator.card import model_card, statistics_card
from billhook.orchestrator.collected import source_of
from billhook.orchestrator.event_log import log
from billhook.orchestrator.events import (
    Progress,
    RunFailed,
    RunFinished,
    Step,
    Warned,
    no_progress,
    sparsity_of,
    together,
)
from billhook.orchestrator.gradient_pass import take_gradients
from billhook.orchestrator.gradients import gradients_size_bytes, remove_gradients
from billhook.orchestrator.history import (
    History,
    branch_point,
    check_beforehand,
    history_of,
    is_collection,
    read_history,
    reports_of,
)
from billhook.orchestrator.interruption import Interruption
from billhook.orchestrator.journal import append
from billhook.orchestrator.keeping import remove_kept
from billhook.orchestrator.metrics import check_installed, metrics_logged
from billhook.orchestrator.opening import opening
from billhook.orchestrator.paths import user_path
from billhook.orchestrator.plan_page import plan_as_text
from billhook.orchestrator.planning import Plan, estimate, make_plan
from billhook.orchestrator.recipe import Recipe, Resources, RunOptions, merged_options, read_options
from billhook.orchestrator.reporting import report as write_report
from billhook.orchestrator.request import Request, make_collecting_request, make_request
from billhook.orchestrator.units import gibibytes


@dataclass(frozen=True)
class PruneResult:
    """How a run ended."""

    output: Path
    sparsity: float
    """Zeros over elements of the linears pruned."""
    seconds: float
    """Of this command; 0 when the run had already finished."""
    peak_bytes: dict[str, int]
    """Measured vram, ram and disk of this node; 0 for what this command did not use."""
    planned_bytes: dict[str, int]
    """The same, as planned; empty when the run had already finished."""
    budgets: Budgets | None
    """None when the run had already finished."""
    blocks: int
    linears: tuple[LinearReport, ...]
    already_finished: bool


@dataclass(frozen=True)
class CollectResult:
    """What was collected."""

    output: Path
    size_bytes: int
    """Of the statistics."""
    seconds: float
    """Of this command; 0 when the run had already finished."""
    peak_bytes: dict[str, int]
    """As of :class:`PruneResult`."""
    linears: int
    """That can be solved on them."""
    already_finished: bool


def prune(
    model: str | Path,
    output: str | Path,
    *,
    recipe: str | Path | None = None,
    from_block: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
    interruption: Interruption | None = None,
    **options: Unpack[RunOptions],
) -> PruneResult:
    """Prune ``model`` into the folder ``output``; go on with an interrupted run of the same plan if it holds one.

    model: a folder or a Hugging Face hub id. recipe: a YAML file of options; ``options`` win over it.
    from_block: keep the blocks before this one, and redo the others, with other options if wished.
    force: go on with other versions of libraries, or on another kind of machine, than the run was begun with.
    progress: told of every event (:mod:`billhook.orchestrator.events`), as ``print``.
    interruption: through which the caller can ask the run to end.

    Raises:
        InputError: the request or the input is wrong; no output is left behind.
        Interrupted: the run was asked to end; the same call goes on from the last finished block.
        RunError: the run failed; the same call goes on from the last finished block.
    """
    asked, resources = read_options(recipe, options)
    return _carry_out(
        make_request(model, asked),
        user_path(output),
        (str(model), asked, resources),
        from_block,
        force,
        no_progress if progress is None else progress,
        interruption or Interruption(),
    )


def collect(
    model: str | Path,
    output: str | Path,
    *,
    recipe: str | Path | None = None,
    force: bool = False,
    progress: Progress | None = None,
    interruption: Interruption | None = None,
    **options: Unpack[RunOptions],
) -> CollectResult:
    """Pass the calibration samples through the dense ``model``; write the statistics of every linear's input.

    output: a folder; an interrupted run of the same plan that it holds is gone on with. The other arguments are those
    of :func:`prune`, but for what is about solving.

    Raises:
        InputError, Interrupted, RunError: as :func:`prune`.
    """
    asked, resources = read_options(recipe, options)
    done = _carry_out(
        make_collecting_request(model, asked),
        user_path(output),
        (str(model), asked, resources),
        None,
        force,
        no_progress if progress is None else progress,
        interruption or Interruption(),
    )
    size = sum(path.stat().st_size for path in done.output.glob("*.safetensors"))
    return CollectResult(done.output, size, done.seconds, done.peak_bytes, len(done.linears), done.already_finished)


def solve(
    folder: str | Path,
    output: str | Path,
    *,
    model: str | Path | None = None,
    recipe: str | Path | None = None,
    force: bool = False,
    progress: Progress | None = None,
    interruption: Interruption | None = None,
    **options: Unpack[RunOptions],
) -> PruneResult:
    """Prune the model whose statistics :func:`collect` wrote to ``folder``, without running a sample.

    model: where it is now; by default where it was then. The other arguments are those of :func:`prune`.

    Raises:
        InputError, Interrupted, RunError: as :func:`prune`.
    """
    source = source_of(folder) if model is None else model
    options = {**options, "collected": str(folder)}
    way: Any = {"recipe": recipe, "force": force, "progress": progress, "interruption": interruption}
    return prune(source, output, **way, **options)


def resume(
    output: str | Path,
    *,
    from_block: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
    interruption: Interruption | None = None,
    **options: Unpack[RunOptions],
) -> PruneResult:
    """Go on with the run in ``output`` as it was asked for; ``options`` win over what was. See :func:`prune`."""
    target = user_path(output)
    history = read_history(target) if target.is_dir() else None
    if history is None or not history.decided:
        raise NoRunError(f"--resume {output}: holds no billhook run; begin one with 'billhook prune MODEL -o {output}'")
    before = history.decided[-1]
    asked, resources = read_options(None, merged_options(before.asked["recipe"] | before.asked["resources"], options))
    model = before.source if Path(before.source).is_dir() else before.asked["model"]
    collects = is_collection(history)
    return _carry_out(
        (make_collecting_request if collects else make_request)(model, asked),
        target,
        (model, asked, resources),
        from_block,
        force,
        no_progress if progress is None else progress,
        interruption or Interruption(),
    )


def _carry_out(
    request: Request,
    target: Path,
    asked: tuple[str, Recipe, Resources],
    from_block: int | None,
    force: bool,
    progress: Progress,
    interruption: Interruption,
) -> PruneResult:
    """Do what is requested, or what is left of it. asked: model, recipe and resources, as they were given."""
    begin = time.monotonic()
    model, recipe, resources = asked
    _check_packages(resources)
    _check_kind(request, target)
    checkpoint, blocks = request.model.checkpoint, len(request.model.layout.blocks)
    windows = windows_of(request)
    existed = target.is_dir()
    with out.locked(target) as lock, contextlib.ExitStack() as stack:
        history, begun = read_history(target), False
        report = together(functools.partial(log, target), progress)
        try:
            # What is refused changes nothing: the log of a run that is there grows once it is clear that it goes on.
            sha256 = windows.sha256 if windows else None
            if not request.is_allocated:
                check_beforehand(history, request.fingerprint(sha256), from_block, force, str(target))
            request = allocated(request, resources, windows, target, progress if history.decided else report)
            fingerprint = request.fingerprint(sha256)
            branch = branch_point(history, fingerprint, from_block, force, str(target))
            if history.done is not None and branch is None:
                return _already_finished(target, history)
            remove_leftovers()
            access = out.begin_access(target)
            plan = make_plan(request, resources, target)
            progress(Step("plan", 1, 1, "\n" + plan_as_text(plan)))
            decided: dict[str, Any] = {
                "fingerprint": fingerprint,
                "source": str(checkpoint.folder),
                "asked": _with_absolute_paths(model, recipe, resources),
            }
            metrics = metrics_logged(resources.log_to, target, decided["asked"], report)
            report = together(report, stack.enter_context(metrics))
            if not history.decided:
                out.create_shards(target, request.written)
            if not history.decided or branch is not None:
                _note_plan(target, branch, decided)
            append(target, "start", {"pid": os.getpid(), "host": socket.gethostname(), "blocks": blocks})
            begun = True
            peak = _work(Run(plan, windows, access, target, lock, report, interruption))
        except BaseException as error:
            refused = isinstance(error, InputError) or not begun
            if refused and not history.decided and not read_history(target).blocks:
                if lock.in_place:
                    out.remove_output(target, request.written, keep_folder=existed)
            elif begun and lock.in_place:
                _note_failure(target, report, RunFailed(type(error).__name__, str(error) or "interrupted"))
            if isinstance(error, OSError):
                raise disk_failure(str(error.filename or f"{target}/"), "working", error) from error
            if isinstance(error, KeyboardInterrupt) and interruption.asked:
                raise Interrupted("ended before the first block of this command") from error
            raise
        linears = reports_of(read_history(target))
        if peak["ram"] > plan.budgets.ram:
            used, budget = gibibytes(peak["ram"]), gibibytes(plan.budgets.ram)
            report(Warned(f"{used} of memory were used, more than the budget of {budget}"))
        _end(request, target, report, RunFinished(time.monotonic() - begin, sparsity_of(linears), blocks, peak))
    return PruneResult(
        target,
        sparsity_of(linears),
        time.monotonic() - begin,
        peak,
        estimate(plan).peak_bytes,
        plan.budgets,
        blocks,
        linears,
        False,
    )


def _check_kind(request: Request, target: Path) -> None:
    """Check that the output may be written to, and holds nothing of another kind."""
    out.check_free(target, request.model.checkpoint)
    history = read_history(target) if target.is_dir() else history_of([])
    if history.decided and is_collection(history) != (request.collects is not None):
        there, here = ("statistics", "a checkpoint")[:: -1 if request.collects else 1]
        raise OtherPlanError(f"{target}: holds {there}, and this makes {here}; choose another folder")


def _check_packages(resources: Resources) -> None:
    check_installed(resources.log_to)
    if resources.dashboard:
        check_dashboard()


def _note_plan(output: Path, from_block: int | None, decided: dict[str, Any]) -> None:
    if from_block is None:
        append(output, "plan", decided)
    else:
        append(output, "branch", {"from_block": from_block, **decided})


def _already_finished(output: Path, history: History) -> PruneResult:
    linears, unused = reports_of(history), {"vram": 0, "ram": 0, "disk": out.size_bytes(output)}
    return PruneResult(output, sparsity_of(linears), 0.0, unused, {}, None, len(history.blocks), linears, True)


def _end(request: Request, output: Path, report: Progress, finished: RunFinished) -> None:
    """Tell that a run is finished, and write a prune's report; one that cannot be written takes nothing from it."""
    report(finished)
    if request.collects is not None:
        return
    try:
        write_report(output)
    except Exception as error:
        again = f"'billhook report {output}' tries again"
        report(Warned(f"the report could not be written; the checkpoint is complete, {again}: {error}"))


def _note_failure(output: Path, report: Progress, failed: RunFailed) -> None:
    with contextlib.suppress(Exception):  # it may be the disk that failed
        append(output, "error", {"type": failed.type, "message": failed.message})
    with contextlib.suppress(Exception):
        report(failed)


def _with_absolute_paths(model: str, recipe: Recipe, resources: Resources) -> dict[str, Any]:
    """Return what was asked for as JSON values that mean the same in any working folder."""
    asked: dict[str, Any] = {
        "model": model,
        "recipe": recipe.model_dump(mode="json"),
        "resources": resources.model_dump(mode="json"),
    }
    if user_path(model).is_dir():
        asked["model"] = str(user_path(model))
    calibration, scratch = recipe.calibration, resources.scratch
    if recipe.collected is not None:
        asked["recipe"]["collected"] = str(user_path(recipe.collected))
    if calibration not in (None, "random") and user_path(str(calibration)).exists():
        asked["recipe"]["calibration"] = str(user_path(str(calibration)))
    if user_path(recipe.allocation).is_file():
        asked["recipe"]["allocation"] = str(user_path(recipe.allocation))
    if scratch is not None:
        asked["resources"]["scratch"] = str(user_path(scratch))
    return asked


def _work(run: Run) -> dict[str, int]:
    """Do all that is left of a run that was begun; return peaks by tier."""
    plan, output = run.plan, run.output
    for event in opening(plan, len(read_history(output).blocks)):
        run.report(event)
    store(plan.request, run.windows, output)
    peak = _run(run)
    run.lock.check()
    run.report(Step("finish", 0, 1, "reading the output for the hashes of its files"))
    _finish(plan, run.windows, output)
    return {**peak, "disk": peak["disk"] + out.size_bytes(output)}


def _run(run: Run) -> dict[str, int]:
    """Commit every block that is not committed yet, and the tensors outside the blocks; return peaks by tier."""
    request, output = run.plan.request, run.output
    history = read_history(output)
    unpruned = len(history.blocks) < len(request.model.layout.blocks)
    if unpruned or not history.rest_copied:
        out.unseal(output, request.written)
    peak = {"vram": 0, "ram": 0, "disk": 0}
    if unpruned:
        try:
            before = take_gradients(run)
            used = commit_blocks(run)
            peak = {tier: max(used[tier], before[tier]) for tier in used}
            peak["disk"] += gradients_size_bytes(output)
        except RunError as error:
            run.lock.check()  # what failed may have failed for that
            if run.interruption.asked:  # a signal to the whole process group ends the workers too
                raise Interrupted(str(error)) from error
            raise
    if not history.rest_copied:
        run.report(Step("copy", 0, 1, "tensors outside the blocks"))
        out.copy_tensors(request.copied, output)
        append(output, "rest", {"tensors": len(request.copied)})
    return peak


def _finish(plan: Plan, windows: Windows | None, output: Path) -> None:
    request, history = plan.request, read_history(output)
    reports = reports_of(history)
    sha256 = windows.sha256 if windows else None
    *earlier, current = history.decided
    if request.collects is None:
        card = model_card(request, reports, sha256, earlier)
    else:
        card = statistics_card(request, sha256)
    out.seal(output, request.written, card)
    manifest = out.write_manifest(
        output,
        {
            **current.fingerprint,
            "pattern": str(request.pattern),
            "sparsity": sparsity_of(reports),
            "linears": reports,
            "from_block": current.first_block,
            "earlier": [{"from_block": each.first_block, **each.fingerprint} for each in earlier],
        },
    )
    remove_kept(output)
    remove_gradients(output)
    append(output, "done", {"manifest": manifest})
