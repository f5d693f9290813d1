"""Perplexity of a checkpoint, streamed: every worker holds one block at a time."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from billhook.layerworkers.errors import InputError
from billhook.layerworkers.reduction import even_ranges
from billhook.layerworkers.tasks import Sample
from billhook.orchestrator.calibration import (
    CHARACTERS_PER_TOKEN,
    check_vocabulary,
    default_seqlen,
    evaluation_windows,
    load_tokenizer,
    read_text,
)
from billhook.orchestrator.model import check_gpus, open_model, resolve_workers
from billhook.orchestrator.planning import check_context
from billhook.orchestrator.workers import Progress, Workers, no_progress, worker_pool


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
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Evaluation:
    """Compute the perplexity of ``checkpoint`` on the first ``windows`` non-overlapping windows of a text.

    text: a text file, JSONL file or Hugging Face dataset. seqlen: tokens of a window, default min(2048, context).
    windows: default all that the text has.

    Raises:
        InputError: the request or the input is wrong.
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
    samples = [Sample(index, tokens) for index, tokens in enumerate(cut.tokens)]
    count = resolve_workers(workers, model.device, threads, len(samples))
    check_gpus(count, model.device, address)
    blocks = model.layout.blocks
    check_vocabulary(cut, model.layout.stem.embedding.shape[0], str(text))
    report = progress or no_progress
    with worker_pool(model.worker_setup(threads), Workers(count, threads, address), report) as (pool, memory):
        shares = [samples[start:stop] for start, stop in even_ranges(len(samples), count)]
        pool.start(model.layout.stem, shares)
        for block in blocks:
            later = blocks[block.index + 1 : block.index + 2]
            pool.forward_block(block.index, block.tensors, later[0].tensors if later else ())
            report("eval", block.index + 1, len(blocks), "")
        losses = pool.losses()
        vram = pool.peak_vram_bytes()
    mean = math.fsum(loss.nats for loss in losses) / len(losses)
    return Evaluation(
        math.exp(mean) if mean < 700 else math.inf,
        len(losses),
        sum(loss.targets for loss in losses),
        length,
        time.monotonic() - begin,
        {"vram": vram, "ram": memory.peak_bytes, "disk": 0},
    )
