"""Perplexity of a checkpoint, and its distance from another, streamed: every worker holds one block at a time."""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from billhook.cluster.memory import own_bytes
from billhook.layerworkers.errors import InputError, OptionError
from billhook.layerworkers.methods import METHODS
from billhook.layerworkers.patterns import parse_pattern
from billhook.layerworkers.tasks import Sample, WindowComparison
from billhook.orchestrator.budgets import DISK_RESERVE_BYTES, free_disk_bytes, resolve_budgets
from billhook.orchestrator.calibration import (
    CHARACTERS_PER_TOKEN,
    check_vocabulary,
    deal_samples,
    default_seqlen,
    evaluation_windows,
    load_tokenizer,
    read_text,
)
from billhook.orchestrator.events import Progress, Step, no_progress
from billhook.orchestrator.job import Job
from billhook.orchestrator.logits_needs import item_bytes, logits_bytes
from billhook.orchestrator.model import Model, check_gpus, open_model, resolve_workers
from billhook.orchestrator.needs import Need
from billhook.orchestrator.paths import user_path
from billhook.orchestrator.placing import Arrangement, arrange
from billhook.orchestrator.planning import block_work
from billhook.orchestrator.probe import measured_rates
from billhook.orchestrator.recipe import RunOptions, read_options
from billhook.orchestrator.request import check_context
from billhook.orchestrator.workers import (
    PATIENCE_SECONDS,
    Workers,
    ray_for,
    reserve_places,
    start_pool,
)

if TYPE_CHECKING:
    from billhook.cluster.pool import WorkerPool


@dataclass(frozen=True)
class Comparison:
    """How far a checkpoint's predictions are from those of a reference, on the same windows."""

    reference: str
    """Folder, as an absolute path, or hub id."""
    perplexity: float
    """Of the reference."""
    divergence: float
    """Mean over the targets of the KL divergence ``sum_v p_v log(p_v / q_v)`` of the checkpoint's next-token
    probabilities q from the reference's p, in nats per token."""
    agreement: float
    """Share of the targets before which both hold the same token to be the likeliest."""


@dataclass(frozen=True)
class Evaluation:
    """Perplexity of a checkpoint on a text."""

    perplexity: float
    """``exp`` of the mean over windows of the mean cross-entropy of a window's targets; may be infinite."""
    windows: int
    tokens: int
    """Targets, over all windows."""
    seqlen: int
    seconds: float
    peak_bytes: dict[str, int]
    nats: tuple[float, ...]
    """Mean cross-entropy of each window, per target."""
    checkpoint: str
    """Folder, as an absolute path, or hub id."""
    text: str
    """File, as an absolute path, or dataset."""
    against: Comparison | None = None
    """With the reference, where there is one."""


def evaluate(
    checkpoint: str | Path,
    text: str | Path,
    *,
    against: str | Path | None = None,
    seqlen: int | None = None,
    windows: int | None = None,
    field: str = "text",
    bos: Literal["auto", "always", "never"] = "auto",
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    threads: int = 1,
    workers: int | Literal["auto"] = "auto",
    address: str | None = None,
    vram: int | str | None = None,
    ram: int | str | None = None,
    scratch: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Evaluation:
    """Compute the perplexity of ``checkpoint`` on the first ``windows`` non-overlapping windows of a text.

    text: a text file, JSONL file or Hugging Face dataset. against: a reference with the same tokens, such as the dense
    model; it passes first, and only its last hidden states are kept. seqlen: tokens of a window, default
    min(2048, context). windows: default all that the text has. vram, ram: budgets as of ``prune``. scratch: folder for
    hidden states that they have no room for, default the system's for temporary files.

    Raises:
        InputError: the request or the input is wrong, or does not fit the budgets.
        RunError: a worker failed.
    """
    begin = time.monotonic()
    if windows is not None and windows < 1:
        raise OptionError(f"--windows {windows}: expected at least 1")
    if threads < 1 or (isinstance(workers, int) and workers < 1):
        raise OptionError(f"--workers {workers}, --threads {threads}: expected at least 1")
    if seqlen is not None and seqlen < 2:
        raise OptionError(f"--seqlen {seqlen}: expected at least 2 tokens, since the first is no target")
    model = open_model(checkpoint, device, dtype, trust_remote_code)
    reference = None if against is None else open_model(against, device, dtype, trust_remote_code)
    models = [model] if reference is None else [reference, model]
    length = seqlen or min(default_seqlen(each.config) for each in models)
    check_context(length, model.config)
    if reference is not None:
        _check_alike(model, reference, length, str(against))
    tokenizer = load_tokenizer(model.checkpoint.folder, trust_remote_code)
    content = read_text(str(text), field, windows * length * CHARACTERS_PER_TOKEN if windows else None)
    cut = evaluation_windows(tokenizer, content, length, windows, bos, str(text))
    if reference is not None:
        theirs = load_tokenizer(reference.checkpoint.folder, trust_remote_code)
        if evaluation_windows(theirs, content, length, windows, bos, str(text)).sha256 != cut.sha256:
            raise OptionError(
                f"--against {against}: its tokenizer makes other tokens of {text} than that of {checkpoint}; compare "
                "checkpoints of one model"
            )
    most = resolve_workers(workers, model.device, threads, len(cut.tokens))
    check_gpus(most, model.device, address)
    check_vocabulary(cut, min(each.layout.stem.embedding.shape[0] for each in models), str(text))
    parked = user_path(scratch or tempfile.gettempdir())
    arranged = _arrange_all(
        models, len(cut.tokens), length, {"workers": workers, "vram": vram, "ram": ram}, most, parked
    )
    report = no_progress if progress is None else progress
    count, setups = (
        arranged[0].workers,
        [each.worker_setup(threads, way.activations, str(parked)) for each, way in zip(models, arranged, strict=True)],
    )
    wanted = Workers(count, threads, address, count)
    with (
        ray_for(wanted, model.device, report) as memory,
        start_pool(setups[0], reserve_places(wanted, model.device, count, PATIENCE_SECONDS)) as pool,
    ):
        passed, total = 0, sum(len(each.layout.blocks) for each in models)
        for number, (each, way) in enumerate(zip(models, arranged, strict=True)):
            if number:
                pool.compare_with_another(setups[number])
            _forward(pool, each, way, deal_samples(cut, 1, pool.size), report, passed, total)
            passed += len(each.layout.blocks)
        comparisons = pool.comparisons() if reference is not None else []
        losses = [each.loss for each in comparisons] or pool.losses()
        vram_peak, scratch_bytes = pool.peak_vram_bytes(), pool.scratch_bytes()
    return Evaluation(
        _perplexity([loss.nats for loss in losses]),
        len(losses),
        sum(loss.targets for loss in losses),
        length,
        time.monotonic() - begin,
        {"vram": vram_peak, "ram": memory.peak_bytes, "disk": scratch_bytes},
        tuple(loss.nats for loss in losses),
        _absolute(checkpoint),
        _absolute(text),
        _comparison(_absolute(str(against)), comparisons) if comparisons else None,
    )


def _absolute(named: str | Path) -> str:
    """Return a path that is there as an absolute one, and what is none as it is."""
    path = user_path(named)
    return str(path if path.exists() else named)


def _forward(
    pool: WorkerPool,
    model: Model,
    way: Arrangement,
    samples: list[list[Sample]],
    report: Progress,
    begin: int,
    total: int,
) -> None:
    """Carry the windows through all blocks of a model; ``begin`` of ``total`` blocks have been passed before."""
    blocks = model.layout.blocks
    pool.start(model.layout.stem, samples)
    for block in blocks:
        later = blocks[block.index + 1 : block.index + 2] if way.placements[block.index].read_ahead else ()
        pool.forward_block(block.index, block.tensors, later[0].tensors if later else ())
        report(Step("eval", begin + block.index + 1, total, ""))


def _perplexity(nats: Sequence[float]) -> float:
    mean = math.fsum(nats) / len(nats)
    return math.exp(mean) if mean < 700 else math.inf


def _comparison(reference: str, windows: Sequence[WindowComparison]) -> Comparison:
    """Put the windows' comparisons together; all have as many targets."""
    return Comparison(
        reference,
        _perplexity([each.reference_nats for each in windows]),
        math.fsum(each.divergence_nats for each in windows) / len(windows),
        sum(each.agreeing for each in windows) / sum(each.loss.targets for each in windows),
    )


def _check_alike(model: Model, reference: Model, seqlen: int, name: str) -> None:
    """Check that the predictions of two models can be compared."""
    ours, theirs = model.layout.stem.head.shape[0], reference.layout.stem.head.shape[0]
    if ours != theirs:
        raise OptionError(
            f"--against {name}: its vocabulary has {theirs} tokens, that of {model.checkpoint.folder} {ours}; compare "
            "checkpoints of one model"
        )
    try:
        check_context(seqlen, reference.config)
    except InputError as error:
        raise OptionError(f"--against {name}: {error}") from error


def _arrange_all(
    models: Sequence[Model], windows: int, seqlen: int, limits: RunOptions, workers: int, scratch: Path
) -> list[Arrangement]:
    """Choose how each model passes, on as many workers each, and with hidden states in the same place.

    Both models' hidden states are there at the end. Each is planned with as if both were as wide as the wider one.
    """
    by_width = sorted(models, key=lambda model: -model.config.get_text_config().hidden_size * item_bytes(model))
    logits = sum(logits_bytes(model, seqlen) for model in models)
    kept = len(models) * windows
    made = {id(by_width[0]): _arrange(by_width[0], kept, seqlen, limits, workers, scratch, logits)}
    first = made[id(by_width[0])]
    for model in by_width[1:]:
        fixed = cast(RunOptions, {**limits, "workers": first.workers})
        made[id(model)] = _arrange(model, kept, seqlen, fixed, first.workers, scratch, logits, first.activations)
    return [made[id(model)] for model in models]


def _arrange(
    model: Model,
    windows: int,
    seqlen: int,
    limits: RunOptions,
    workers: int,
    scratch: Path,
    logits_bytes: int,
    activations: str = "auto",
) -> Arrangement:
    """Choose where hidden states are kept and whether blocks are read ahead: a run that prunes nothing."""
    computed = {"method": "magnitude", "device": model.device, "dtype": model.dtype}
    sized = {"samples": windows, "seqlen": seqlen, "partition_samples": 1}
    recipe, resources = read_options(None, cast(RunOptions, {**computed, **sized, **limits}))
    method = METHODS["magnitude"]
    job = Job(recipe, method, method.options(), parse_pattern("unstructured", 0.0), windows)
    budgets = resolve_budgets(resources.vram, resources.ram, None, model.device, None)
    return arrange(
        job,
        block_work(model, tuple(() for _ in model.layout.blocks), seqlen),
        replace(budgets, disk=max(0, free_disk_bytes(scratch) - DISK_RESERVE_BYTES)),
        measured_rates(model),
        range(workers, 0, -1) if resources.workers == "auto" else [workers],
        own_bytes(os.getpid()),
        {"activations": activations, "intermediates": "auto", "statistics": "auto"},
        0,
        Need(logits_bytes, 0, 0),
    )
