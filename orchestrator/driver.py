"""Prune a model: block after block through the workers into the output, from wherever the journal says."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from billhook.cluster.session import remove_leftovers
from billhook.layerworkers.errors import InputError, Interrupted, RunError
from billhook.layerworkers.files import disk_failure
from billhook.layerworkers.reduction import even_ranges
from billhook.layerworkers.tasks import BlockReport, BlockTask, LinearReport, ModuleTensor, Sample
from billhook.orchestrator import output as out
from billhook.orchestrator.budgets import Budgets
from billhook.orchestrator.calibration import Windows, calibration_windows, check_vocabulary
from billhook.orchestrator.card import model_card
from billhook.orchestrator.history import History, branch_point, read_history
from billhook.orchestrator.interruption import Interruption
from billhook.orchestrator.journal import FOLDER, append
from billhook.orchestrator.keeping import create_kept, find_kept, kept_size_bytes, remove_kept
from billhook.orchestrator.paths import user_path
from billhook.orchestrator.planning import Plan, estimate, make_plan
from billhook.orchestrator.printing import arrangement_as_text
from billhook.orchestrator.recipe import Recipe, Resources, RunOptions, merged_options, read_options
from billhook.orchestrator.request import make_request
from billhook.orchestrator.workers import Progress, no_progress, worker_pool

if TYPE_CHECKING:
    from billhook.cluster.pool import WorkerPool


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
    interruption: through which the caller can ask the run to end.

    Raises:
        InputError: the request or the input is wrong; no output is left behind.
        Interrupted: the run was asked to end; the same call goes on from the last finished block.
        RunError: the run failed; the same call goes on from the last finished block.
    """
    asked, resources = read_options(recipe, options)
    return _prune(
        str(model),
        user_path(output),
        (asked, resources),
        from_block,
        force,
        no_progress if progress is None else progress,
        interruption or Interruption(),
    )


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
        raise InputError(f"--resume {output}: holds no billhook run; begin one with 'billhook prune MODEL -o {output}'")
    before = history.decided[-1]
    asked, resources = read_options(None, merged_options(before.asked["recipe"] | before.asked["resources"], options))
    return _prune(
        before.source if Path(before.source).is_dir() else before.asked["model"],
        target,
        (asked, resources),
        from_block,
        force,
        no_progress if progress is None else progress,
        interruption or Interruption(),
    )


def _prune(
    model: str,
    target: Path,
    asked: tuple[Recipe, Resources],
    from_block: int | None,
    force: bool,
    report: Progress,
    interruption: Interruption,
) -> PruneResult:
    begin = time.monotonic()
    recipe, resources = asked
    request = make_request(model, recipe)
    checkpoint, blocks = request.model.checkpoint, len(request.model.layout.blocks)
    out.check_free(target, checkpoint)
    windows = None
    if request.samples:
        windows = calibration_windows(request.recipe, checkpoint.folder, request.model.config)
        check_vocabulary(windows, request.model.layout.stem.embedding.shape[0], str(recipe.calibration))
    fingerprint = request.fingerprint(windows.sha256 if windows else None)
    existed = target.is_dir()
    with out.locked(target) as lock:
        history = read_history(target)
        branch = branch_point(history, fingerprint, from_block, force, str(target))
        if history.done is not None and branch is None:
            linears = _reports(history)
            unused = {"vram": 0, "ram": 0, "disk": _size_bytes(target)}
            return PruneResult(target, sparsity_of(linears), 0.0, unused, {}, None, blocks, linears, True)
        try:
            remove_leftovers()
            out.wait_for_orphans(target)
            plan = make_plan(request, resources, target)
            report("plan", 1, 1, arrangement_as_text(plan))
            decided = {
                "fingerprint": fingerprint,
                "source": str(checkpoint.folder),
                "asked": _with_absolute_paths(model, recipe, resources),
            }
            if not history.decided:
                out.create_shards(target, checkpoint)
                append(target, "plan", decided)
            elif branch is not None:
                append(target, "branch", {"from_block": branch, **decided})
            append(target, "start", {"pid": os.getpid(), "host": socket.gethostname(), "blocks": blocks})
            peak = _run(plan, windows, target, lock, report, interruption)
            lock.check()
            _finish(plan, windows, target)
        except BaseException as error:
            if isinstance(error, InputError) and not history.decided and not read_history(target).blocks:
                out.remove_output(target, checkpoint, keep_folder=existed)
            elif lock.in_place:
                with contextlib.suppress(Exception):  # it may be the disk that failed
                    append(target, "error", {"type": type(error).__name__, "message": str(error) or "interrupted"})
            if isinstance(error, OSError):
                raise disk_failure(str(error.filename or f"{target}/"), "working", error) from error
            raise
    linears = _reports(read_history(target))
    return PruneResult(
        target,
        sparsity_of(linears),
        time.monotonic() - begin,
        {**peak, "disk": peak["disk"] + _size_bytes(target)},
        estimate(plan).peak_bytes,
        plan.budgets,
        blocks,
        linears,
        False,
    )


def sparsity_of(linears: Sequence[LinearReport]) -> float:
    """Return zeros over elements of the linears pruned."""
    elements = sum(linear.shape[0] * linear.shape[1] for linear in linears)
    return sum(linear.zeros for linear in linears) / elements if elements else 0.0


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
    if calibration not in (None, "random") and user_path(str(calibration)).exists():
        asked["recipe"]["calibration"] = str(user_path(str(calibration)))
    if scratch is not None:
        asked["resources"]["scratch"] = str(user_path(scratch))
    return asked


def _size_bytes(output: Path) -> int:
    return sum(path.stat().st_size for path in output.rglob("*") if path.is_file())


def _run(
    plan: Plan,
    windows: Windows | None,
    output: Path,
    lock: out.Lock,
    report: Progress,
    interruption: Interruption,
) -> dict[str, int]:
    """Commit every block that is not committed yet, and the tensors outside the blocks; return peaks by tier."""
    history, layout = read_history(output), plan.request.model.layout
    unpruned = len(history.blocks) < len(layout.blocks)
    if unpruned or not history.rest_copied:
        out.unseal(output, plan.request.model.checkpoint)
    peak = {"vram": 0, "ram": 0, "disk": 0}
    if unpruned:
        try:
            peak = _run_blocks(plan, windows, output, lock, history, report, interruption)
        except RunError as error:
            if interruption.asked:  # a signal to the whole process group ends the workers too
                raise Interrupted(str(error)) from error
            raise
    if not history.rest_copied:
        report("copy", 0, 1, "tensors outside the blocks")
        out.copy_tensors(layout.rest, output)
        append(output, "rest", {"tensors": len(layout.rest)})
    return peak


def _run_blocks(
    plan: Plan,
    windows: Windows | None,
    output: Path,
    lock: out.Lock,
    history: History,
    report: Progress,
    interruption: Interruption,
) -> dict[str, int]:
    model, total = plan.request.model, len(plan.request.model.layout.blocks)
    scratch = str(user_path(plan.scratch) if plan.scratch else output / FOLDER)
    own = str(out.workers_lock(output))
    setup = model.worker_setup(plan.workers.threads, plan.arrangement.activations, scratch, own)
    recorded = history.decided[-1].fingerprint
    kept_bytes, kept = 0, set[int]()
    with (
        worker_pool(setup, plan.workers, report, interruption.deadline, recorded["machine"] | recorded["versions"]) as (
            pool,
            memory,
        ),
        interruption.polled(),
    ):
        samples = _deal_samples(plan, windows)
        pool.start(model.layout.stem, samples)
        if windows is not None:
            _carry_on(plan, pool, samples, output, history, report, interruption)
        for done in pool.prune_blocks(_tasks(plan, len(history.blocks), output, interruption, kept)):
            lock.check()
            keeps = done.index + 1 in kept
            linears = [dataclasses.asdict(linear) for linear in done.linears]
            seconds = round(done.seconds, 3)
            append(output, "block", {"index": done.index, "linears": linears, "seconds": seconds, "kept_inputs": keeps})
            if keeps:
                kept_bytes = max(kept_bytes, kept_size_bytes(output))
                remove_kept(output, before=done.index + 1)
            timed = {
                "began": done.began,
                "seconds": done.seconds,
                "waited_seconds": done.waited_seconds,
                "ram": memory.peak_bytes,
            }
            _event(output, {"event": "block", "index": done.index, **timed})
            report("prune", done.index + 1, total, _describe(done))
        _check_asked(interruption)
        peak = {"vram": pool.peak_vram_bytes(), "disk": pool.scratch_bytes() + kept_bytes}
    return {**peak, "ram": memory.peak_bytes}


def _carry_on(
    plan: Plan,
    pool: WorkerPool,
    samples: list[list[Sample]],
    output: Path,
    history: History,
    report: Progress,
    interruption: Interruption,
) -> None:
    """Carry the samples through the committed blocks, from the last kept inputs on."""
    blocks, committed, begin = plan.request.model.layout.blocks, len(history.blocks), 0
    if history.kept_inputs is not None:
        kept = find_kept(output, history.kept_inputs, plan.request.samples, plan.hidden_bytes)
        try:
            if kept is not None:
                pool.restore_inputs(kept)
                begin = history.kept_inputs
        except RunError:  # they cannot be read: replay everything
            pool.start(plan.request.model.layout.stem, samples)
    for block in blocks[begin:committed]:
        _check_asked(interruption)
        ahead = plan.arrangement.placements[block.index].read_ahead
        later = blocks[block.index + 1 : committed][:1] if ahead else ()
        tensors = [_in_output(each.tensors, output) for each in (block, *later)]
        pool.forward_block(block.index, *tensors)
        report("replay", block.index + 1, len(blocks), "")


def _tasks(plan: Plan, first: int, output: Path, interruption: Interruption, kept: set[int]) -> Iterator[BlockTask]:
    """Yield the tasks of the blocks from ``first`` on, until asked to end; note in ``kept`` whose inputs are."""
    for block in plan.request.model.layout.blocks[first:]:
        if interruption.asked:
            return
        after, keep = block.index + 1, None
        if plan.keeps_inputs_of(after):
            with contextlib.suppress(RunError):  # a run can do without
                keep = create_kept(output, after, plan.request.samples, plan.hidden_bytes)
                kept.add(after)
        yield plan.task(block.index, output, keep)


def _check_asked(interruption: Interruption) -> None:
    if interruption.asked:
        raise Interrupted("ended between two blocks")


def _deal_samples(plan: Plan, windows: Windows | None) -> list[list[Sample]]:
    """Give each worker a consecutive range of whole partitions."""
    if windows is None:
        return [[] for _ in range(plan.workers.count)]
    size = plan.request.recipe.partition_samples
    samples = [Sample(index, tokens) for index, tokens in enumerate(windows.tokens)]
    return [
        samples[start * size : stop * size] for start, stop in even_ranges(plan.request.partitions, plan.workers.count)
    ]


def _in_output(tensors: Sequence[ModuleTensor], output: Path) -> tuple[ModuleTensor, ...]:
    """Return the tensors as they lie in the unfinished output: the same offsets in its own shards."""
    return tuple(
        dataclasses.replace(
            tensor, entry=dataclasses.replace(tensor.entry, path=f"{output}/{Path(tensor.entry.path).name}.part")
        )
        for tensor in tensors
    )


def _finish(plan: Plan, windows: Windows | None, output: Path) -> None:
    request, history = plan.request, read_history(output)
    reports = _reports(history)
    sha256 = windows.sha256 if windows else None
    *earlier, current = history.decided
    out.seal(output, request.model.checkpoint, model_card(request, reports, sha256, earlier))
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
    append(output, "done", {"manifest": manifest})


def _reports(history: History) -> tuple[LinearReport, ...]:
    return tuple(
        LinearReport(**{**linear, "shape": tuple(linear["shape"]), "dampings": tuple(linear["dampings"])})
        for block in history.blocks
        for linear in block["linears"]
    )


def _describe(done: BlockReport) -> str:
    if not done.linears:
        return f"nothing to prune, {done.seconds:.1f} s"
    worst = max(done.linears, key=lambda linear: linear.error)
    raised = [linear.name for linear in done.linears if len(linear.dampings) > 1]
    notes = f", damping raised for {', '.join(raised)}" if raised else ""
    return (
        f"sparsity {sparsity_of(done.linears):.4f}, largest error {worst.error:.4f} ({worst.name}), "
        f"{done.seconds:.1f} s{notes}"
    )


def _event(output: Path, event: dict[str, Any]) -> None:
    with (output / FOLDER / "events.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"time": time.time(), **event}) + "\n")
