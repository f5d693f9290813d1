"""A worker in this process, without Ray: its logits are the model's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import EXPERTS, FAMILIES, IMAGES

from billhook.layerworkers.collective import Alone
from billhook.layerworkers.tasks import Sample
from billhook.layerworkers.worker import BlockWorker
from billhook.orchestrator.model import open_model


def streamed_logits(folder: Path, windows: list[list[int]]) -> list[torch.Tensor]:
    model = open_model(folder, "cpu", "auto", False)
    worker = BlockWorker(model.worker_setup(torch.get_num_threads()), Alone())
    worker.start(model.layout.stem, [Sample(i, tuple(tokens)) for i, tokens in enumerate(windows)])
    for block in model.layout.blocks:
        worker.forward_block(block.index, block.tensors)
    return [worker.logits(i) for i in range(len(windows))]


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        *((family, {}) for family in FAMILIES),
        ("llama", {"tie_word_embeddings": True}),
        ("gemma2", {"final_logit_softcapping": 5.0, "tie_word_embeddings": True}),
        ("cohere", {"logit_scale": 0.25, "tie_word_embeddings": True}),
        ("opt", {"word_embed_proj_dim": 32}),
        ("llama", {"pad_token_id": 500}),
        ("granite", {"embedding_multiplier": 3.0, "logits_scaling": 2.0}),
    ],
)
def test_streamed_logits_equal_those_of_transformers(make_model: Any, family: str, overrides: dict[str, Any]) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    dtype = torch.float32 if family in EXPERTS else torch.bfloat16
    folder = make_model(family, dtype, **{**FAMILIES[family], **overrides})
    torch.manual_seed(1)
    windows = torch.randint(0, 500, (2, 40))
    auto = AutoModelForImageTextToText if family in IMAGES else AutoModelForCausalLM
    reference = auto.from_pretrained(folder)
    for window, streamed in zip(windows, streamed_logits(folder, windows.tolist()), strict=True):
        with torch.inference_mode():
            expected = reference(window[None]).logits
        if family in EXPERTS:
            # transformers sums a token's experts in another order.
            assert torch.allclose(streamed, expected, rtol=1e-4, atol=1e-4 * float(expected.std()))
        else:
            assert torch.equal(streamed, expected)


def test_losses_are_the_cross_entropy_of_the_next_token(llama: Path) -> None:
    from transformers import AutoModelForCausalLM

    window = torch.randint(0, 512, (1, 40), generator=torch.Generator().manual_seed(2))
    model = open_model(llama, "cpu", "auto", False)
    worker = BlockWorker(model.worker_setup(1), Alone())
    worker.start(model.layout.stem, [Sample(7, tuple(window[0].tolist()))])
    for block in model.layout.blocks:
        worker.forward_block(block.index, block.tensors)
    (loss,) = worker.losses()
    with torch.inference_mode():
        expected = AutoModelForCausalLM.from_pretrained(llama)(window, labels=window).loss
    assert (loss.index, loss.targets) == (7, 39)
    assert loss.nats == pytest.approx(float(expected), rel=1e-5)
