"""Perplexity of a checkpoint, streamed: every worker holds one block at a time."""

from __future__ import annotations

import math
import os
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, cast

import torch

from billhook.cluster.memory import own_bytes
from billhook.layerworkers.errors import InputError
from billhook.layerworkers.methods import METHODS
from billhook.layerworkers.patterns import parse_pattern
from billhook.layerworkers.worker import HEAD_SLICE_BYTES
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
from billhook.orchestrator.model import Model, check_gpus, open_model, resolve_workers
from billhook.orchestrator.paths import user_path
from billhook.orchestrator.phases import Job, Need
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


def evaluate(
    checkpoint: str | Path,
    text: str | Path,
    *,
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

    text: a text file, JSONL file or Hugging Face dataset. seqlen: tokens of a window, default min(2048, context).
    windows: default all that the text has. vram, ram: budgets as of ``prune``. scratch: folder for hidden states that
    they have no room for, default the system's for temporary files.

    Raises:
        InputError: the request or the input is wrong, or does not fit the budgets.
        RunError: a worker failed.
    """
    begin = time.monotonic()
    if windows is not None and windows < 1:
        raise InputError(f"--windows {windows}: expected at least 1")
    if threads < 1 or (isinstance(workers, int) and workers < 1):
        raise InputError(f"--workers {workers}, --threads {threads}: expected at least 1")
    if seqlen is not None and seqlen < 2:
        raise InputError(f"--seqlen {seqlen}: expected at least 2 tokens, since the first is no target")
    model = open_model(checkpoint, device, dtype, trust_remote_code)
    length = seqlen or default_seqlen(model.config)
    check_context(length, model.config)
    tokenizer = load_tokenizer(model.checkpoint.folder, trust_remote_code)
    content = read_text(str(text), field, windows * length * CHARACTERS_PER_TOKEN if windows else None)
    cut = evaluation_windows(tokenizer, content, length, windows, bos, str(text))
    most = resolve_workers(workers, model.device, threads, len(cut.tokens))
    check_gpus(most, model.device, address)
    check_vocabulary(cut, model.layout.stem.embedding.shape[0], str(text))
    parked = user_path(scratch or tempfile.gettempdir())
    arrangement = _arrange(model, len(cut.tokens), length, {"workers": workers, "vram": vram, "ram": ram}, most, parked)
    report = no_progress if progress is None else progress
    count, blocks = arrangement.workers, model.layout.blocks
    setup = model.worker_setup(threads, arrangement.activations, str(parked))
    wanted = Workers(count, threads, address, count)
    with (
        ray_for(wanted, model.device, report) as memory,
        start_pool(setup, reserve_places(wanted, model.device, count, PATIENCE_SECONDS)) as pool,
    ):
        pool.start(model.layout.stem, deal_samples(cut, 1, pool.size))
        for block in blocks:
            later = blocks[block.index + 1 : block.index + 2] if arrangement.placements[block.index].read_ahead else ()
            pool.forward_block(block.index, block.tensors, later[0].tensors if later else ())
            report(Step("eval", block.index + 1, len(blocks), ""))
        losses = pool.losses()
        vram_peak, scratch_bytes = pool.peak_vram_bytes(), pool.scratch_bytes()
    mean = math.fsum(loss.nats for loss in losses) / len(losses)
    return Evaluation(
        math.exp(mean) if mean < 700 else math.inf,
        len(losses),
        sum(loss.targets for loss in losses),
        length,
        time.monotonic() - begin,
        {"vram": vram_peak, "ram": memory.peak_bytes, "disk": scratch_bytes},
    )


def _arrange(model: Model, windows: int, seqlen: int, limits: RunOptions, workers: int, scratch: Path) -> Arrangement:
    """Choose where hidden states are kept and whether blocks are read ahead: a run that prunes nothing."""
    computed = {"method": "magnitude", "device": model.device, "dtype": model.dtype}
    sized = {"samples": windows, "seqlen": seqlen, "partition_samples": 1}
    recipe, resources = read_options(None, cast(RunOptions, {**computed, **sized, **limits}))
    method = METHODS["magnitude"]
    job = Job(recipe, method, method.options(), parse_pattern("unstructured", 0.0), windows)
    own = own_bytes(os.getpid())
    entry, vocabulary = model.layout.stem.head, model.layout.stem.head.shape[0]
    item = getattr(torch, model.dtype).itemsize
    capped = getattr(model.config.get_text_config(), "final_logit_softcapping", None) is not None
    # The logits, with the copies that capping makes; a slice of the head in both dtypes; and of 128 targets the
    # logits in float32, their log-probabilities, and whether they are finite.
    logits = (3 if capped else 1) * item * seqlen * vocabulary
    logits += 3 * min(HEAD_SLICE_BYTES, entry.size_bytes) + 12 * 128 * vocabulary
    budgets = resolve_budgets(resources.vram, resources.ram, None, model.device, None)
    return arrange(
        job,
        block_work(model, tuple(() for _ in model.layout.blocks), seqlen),
        replace(budgets, disk=max(0, free_disk_bytes(scratch) - DISK_RESERVE_BYTES)),
        measured_rates(model),
        range(workers, 0, -1) if resources.workers == "auto" else [workers],
        own,
        dict.fromkeys(("activations", "intermediates", "statistics"), "auto"),
        0,
        Need(logits, 0, 0),
    )
