"""Prune a model: plan, then block after block through the workers into the output."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

from billhook.layerworkers.errors import InputError
from billhook.layerworkers.reduction import even_ranges
from billhook.layerworkers.tasks import BlockReport, LinearReport, ModuleTensor, Sample
from billhook.orchestrator import output as out
from billhook.orchestrator.budgets import Budgets
from billhook.orchestrator.calibration import Windows, calibration_windows, check_vocabulary
from billhook.orchestrator.card import model_card
from billhook.orchestrator.journal import FOLDER, append, read_journal
from billhook.orchestrator.paths import user_path
from billhook.orchestrator.planning import Plan, estimate, make_plan
from billhook.orchestrator.printing import arrangement_as_text
from billhook.orchestrator.recipe import RunOptions, read_options
from billhook.orchestrator.workers import Progress, no_progress, worker_pool


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
    """The same, as planned."""
    budgets: Budgets
    blocks: int
    linears: tuple[LinearReport, ...]
    already_finished: bool


def prune(
    model: str | Path,
    output: str | Path,
    *,
    recipe: str | Path | None = None,
    progress: Progress | None = None,
    **options: Unpack[RunOptions],
) -> PruneResult:
    """Prune ``model`` into the folder ``output``; go on with an interrupted run of the same plan if it holds one.

    model: a folder or a Hugging Face hub id. recipe: a YAML file of options; ``options`` win over it.

    Raises:
        InputError: the request or the input is wrong; no output is left behind.
        RunError: the run failed; the same call goes on from the last finished block.
    """
    begin = time.monotonic()
    asked, resources = read_options(recipe, options)
    report = progress or no_progress
    target = user_path(output)  # absolute: workers have a working folder of their own
    plan = make_plan(model, asked, resources, target)
    out.check_free(target, plan.model.checkpoint)
    report("plan", 1, 1, arrangement_as_text(plan))
    windows = None
    if plan.method.statistic is not None:
        windows = calibration_windows(plan.recipe, plan.model.checkpoint.folder, plan.model.config)
        check_vocabulary(windows, plan.model.layout.stem.embedding.shape[0], str(plan.recipe.calibration))
    fingerprint = plan.fingerprint(windows.sha256 if windows else None)
    existed = target.is_dir()
    with out.locked(target):
        finished = _finished(target, fingerprint)
        if not finished:
            fresh = not read_journal(target)
            try:
                if fresh:
                    out.create_shards(target, plan.model.checkpoint)
                    append(target, "plan", {"fingerprint": fingerprint, "source": str(plan.model.checkpoint.folder)})
                peak = _run(plan, windows, target, report)
                _finish(plan, windows, target)
            except InputError:
                if not any(line["kind"] == "block" for line in read_journal(target)):
                    out.remove_output(target, plan.model.checkpoint, keep_folder=existed)
                raise
    linears = _reports(target)
    disk = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    return PruneResult(
        target,
        sparsity_of(linears),
        0.0 if finished else time.monotonic() - begin,
        {"vram": 0, "ram": 0, "disk": disk} if finished else {**peak, "disk": peak["disk"] + disk},
        estimate(plan).peak_bytes,
        plan.budgets,
        len(plan.model.layout.blocks),
        linears,
        finished,
    )


def sparsity_of(linears: Sequence[LinearReport]) -> float:
    """Return zeros over elements of the linears pruned."""
    elements = sum(linear.shape[0] * linear.shape[1] for linear in linears)
    return sum(linear.zeros for linear in linears) / elements if elements else 0.0


def _finished(output: Path, fingerprint: dict[str, Any]) -> bool:
    """Whether the output holds this very run, finished.

    Raises:
        InputError: when it holds another run: the keys that differ are named.
    """
    lines = read_journal(output)
    if not lines:
        return False
    differing = _differences(lines[0]["fingerprint"], json.loads(json.dumps(fingerprint)))
    if differing:
        raise InputError(
            f"-o {output}: holds a run with another plan; it differs in {'; '.join(differing[:6])}. "
            "Give the same options to go on with it, or choose another folder"
        )
    return bool(lines[-1]["kind"] == "done")


def _differences(old: Any, new: Any, name: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(key for key in new if key not in old)]
        return [
            line for key in keys for line in _differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
        ]
    return [] if old == new else [f"{name}: {old!r} there, {new!r} asked for"]


def _run(plan: Plan, windows: Windows | None, output: Path, report: Progress) -> dict[str, int]:
    """Commit every block that is not committed yet, and the tensors outside the blocks; return peaks by tier."""
    committed = {line["index"] for line in read_journal(output) if line["kind"] == "block"}
    total = len(plan.model.layout.blocks)
    if len(committed) < total:
        scratch_folder = str(user_path(plan.scratch) if plan.scratch else output / FOLDER)
        setup = plan.model.worker_setup(plan.workers.threads, plan.arrangement.activations, scratch_folder)
        with worker_pool(setup, plan.workers, report) as (pool, memory):
            samples = _deal_samples(plan, windows)
            pool.start(plan.model.layout.stem, samples)
            blocks = plan.model.layout.blocks
            for block in blocks:
                if block.index in committed and windows is not None:
                    pool.forward_block(block.index, _in_output(block.tensors, output))
                    report("replay", block.index + 1, total, "")
            tasks = (plan.task(block.index, output) for block in blocks if block.index not in committed)
            for done in pool.prune_blocks(tasks):
                append(output, "block", {"index": done.index, "linears": [dataclasses.asdict(r) for r in done.linears]})
                timed = {
                    "began": done.began,
                    "seconds": done.seconds,
                    "waited_seconds": done.waited_seconds,
                    "ram": memory.peak_bytes,
                }
                _event(output, {"event": "block", "index": done.index, **timed})
                report("prune", done.index + 1, total, _describe(done))
            scratch = pool.scratch_bytes()
            vram = pool.peak_vram_bytes()
        peak = {"vram": vram, "ram": memory.peak_bytes, "disk": scratch}
    else:
        peak = {"vram": 0, "ram": 0, "disk": 0}
    if not any(line["kind"] == "rest" for line in read_journal(output)):
        report("copy", 0, 1, "tensors outside the blocks")
        out.copy_tensors(plan.model.layout.rest, output)
        append(output, "rest", {"tensors": len(plan.model.layout.rest)})
    return peak


def _deal_samples(plan: Plan, windows: Windows | None) -> list[list[Sample]]:
    """Give each worker a consecutive range of whole partitions."""
    if windows is None:
        return [[] for _ in range(plan.workers.count)]
    size = plan.recipe.partition_samples
    samples = [Sample(index, tokens) for index, tokens in enumerate(windows.tokens)]
    return [samples[start * size : stop * size] for start, stop in even_ranges(plan.partitions, plan.workers.count)]


def _in_output(tensors: Sequence[ModuleTensor], output: Path) -> tuple[ModuleTensor, ...]:
    """Return the tensors as they lie in the unfinished output: the same offsets in its own shards."""
    return tuple(
        dataclasses.replace(
            tensor, entry=dataclasses.replace(tensor.entry, path=f"{output}/{Path(tensor.entry.path).name}.part")
        )
        for tensor in tensors
    )


def _finish(plan: Plan, windows: Windows | None, output: Path) -> None:
    reports = _reports(output)
    sha256 = windows.sha256 if windows else None
    out.seal(output, plan.model.checkpoint, model_card(plan, reports, sha256))
    fingerprint = plan.fingerprint(sha256)
    manifest = out.write_manifest(
        output, {**fingerprint, "pattern": str(plan.pattern), "sparsity": sparsity_of(reports), "linears": reports}
    )
    append(output, "done", {"manifest": manifest})


def _reports(output: Path) -> tuple[LinearReport, ...]:
    blocks = sorted((line for line in read_journal(output) if line["kind"] == "block"), key=lambda line: line["index"])
    return tuple(
        LinearReport(**{**linear, "shape": tuple(linear["shape"]), "dampings": tuple(linear["dampings"])})
        for block in blocks
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
