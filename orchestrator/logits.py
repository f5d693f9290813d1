"""Whether a finished checkpoint predicts the same when it is streamed as it does in transformers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from billhook.layerworkers.errors import BudgetError, OptionError
from billhook.layerworkers.losses import window_loss
from billhook.layerworkers.tasks import Sample
from billhook.orchestrator.budgets import resolve_budgets
from billhook.orchestrator.calibration import CHARACTERS_PER_TOKEN, evaluation_windows, load_tokenizer, read_text
from billhook.orchestrator.evaluation import Comparison, evaluate
from billhook.orchestrator.events import Progress
from billhook.orchestrator.model import Model, open_model
from billhook.orchestrator.units import gibibytes

WINDOWS, SEQLEN = 4, 128
"""Prompts, and tokens of each at most."""

TOLERANCE_NATS = 0.02
"""By how much a window's mean cross-entropy per token may differ.

Of most families no bit differs. The tokens of a mixture's experts are summed in another order, in bfloat16.
"""


@dataclass(frozen=True)
class Prompts:
    """What logits are compared on."""

    text: str
    """Text file, JSONL file or Hugging Face dataset."""
    field: str = "text"


@dataclass(frozen=True)
class LogitsCheck:
    """The same prompts through the streamed forward and through transformers."""

    text: str
    seqlen: int
    streamed_nats: tuple[float, ...]
    """Mean cross-entropy of each prompt, per token."""
    transformers_nats: tuple[float, ...]
    tolerance_nats: float
    against: Comparison | None
    """How far the checkpoint is from its source, both streamed; None where the source is gone."""

    @property
    def difference_nats(self) -> float:
        """Return the largest difference between the two, per token."""
        return max(abs(one - other) for one, other in zip(self.streamed_nats, self.transformers_nats, strict=True))

    @property
    def ok(self) -> bool:
        """Whether they agree."""
        return self.difference_nats <= self.tolerance_nats


def prompts_of(recipe: dict[str, Any], text: str | None) -> Prompts:
    """Return what to compare on: ``text``, or else what the run was calibrated on.

    Raises:
        InputError: when that was no text, or cannot be read.
    """
    if text is None and recipe["calibration"] in (None, "random"):
        raise OptionError("--logits: the run was calibrated on no text; say with --text FILE on what to compare")
    prompts = Prompts(recipe["calibration"], recipe["field"]) if text is None else Prompts(text)
    read_text(prompts.text, prompts.field, 1)
    return prompts


def check_logits(
    output: Path, source: Path | None, prompts: Prompts, trust_remote_code: bool, progress: Progress | None = None
) -> LogitsCheck:
    """Pass a few prompts through the checkpoint as ``billhook eval`` does, and through transformers.

    The latter holds the whole model in memory, on the CPU or the GPU that the former computes on.

    Raises:
        InputError: when there is no room for the whole model, or the text is too short or cannot be read.
        RunError: a worker failed.
    """
    model = open_model(output, "auto", "auto", trust_remote_code)
    _check_room(model)
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or SEQLEN
    length = min(SEQLEN, context)
    streamed = evaluate(
        output,
        prompts.text,
        against=source,
        seqlen=length,
        windows=WINDOWS,
        field=prompts.field,
        workers=1,
        trust_remote_code=trust_remote_code,
        progress=progress,
    )
    text = read_text(prompts.text, prompts.field, WINDOWS * length * CHARACTERS_PER_TOKEN)
    tokenizer = load_tokenizer(output, trust_remote_code)
    windows = evaluation_windows(tokenizer, text, length, WINDOWS, "auto", prompts.text)
    whole = _nats_in_transformers(model, windows.tokens)
    return LogitsCheck(prompts.text, length, streamed.nats, whole, TOLERANCE_NATS, streamed.against)


def _check_room(model: Model) -> None:
    size = sum(parameter.numel() for parameter in model.skeleton.model.parameters())
    size *= int(getattr(torch, model.dtype).itemsize)
    budgets = resolve_budgets(None, None, None, model.device, None)
    room = budgets.ram if model.device == "cpu" else budgets.vram or 0
    if size > room:
        raise BudgetError(
            f"--logits: transformers holds the whole model, {gibibytes(size)} in {model.dtype}, and {gibibytes(room)} "
            "are there; leave --logits out, or verify on a larger machine"
        )


def _nats_in_transformers(model: Model, windows: tuple[tuple[int, ...], ...]) -> tuple[float, ...]:
    device = torch.device(model.device)
    whole = type(model.skeleton.model).from_pretrained(
        model.checkpoint.folder,
        dtype=getattr(torch, model.dtype),
        trust_remote_code=model.trust_remote_code,
        local_files_only=True,
    )
    whole.to(device).eval()
    nats = []
    with torch.inference_mode():
        for index, tokens in enumerate(windows):
            logits_TV = whole(torch.tensor([tokens], device=device), use_cache=False).logits[0]
            nats.append(window_loss(logits_TV, Sample(index, tokens), device).nats)
    return tuple(nats)
