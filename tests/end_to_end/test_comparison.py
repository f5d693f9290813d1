"""The distance of a checkpoint from another, as streamed, against transformers on whole models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import MakeModel

from billhook.orchestrator import InputError, evaluate

pytestmark = pytest.mark.usefixtures("ray_cluster")


def logits_of(folder: Path, windows: torch.Tensor) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    with torch.inference_mode():
        logits: torch.Tensor = model(windows).logits
    return logits


def test_divergence_and_agreement_are_those_of_transformers(make_model: MakeModel, text_file: Path) -> None:
    from transformers import AutoTokenizer

    dense = make_model(dtype=torch.float32)
    other = make_model(dtype=torch.float32, hidden_size=32, num_hidden_layers=2)
    tokens = AutoTokenizer.from_pretrained(dense)(text_file.read_text(), add_special_tokens=False).input_ids
    windows = torch.tensor(tokens[: 5 * 32]).view(5, 32)
    expected, ours = (logits_of(folder, windows)[:, :-1].log_softmax(-1) for folder in (dense, other))
    found = evaluate(other, text_file, against=dense, seqlen=32, windows=5, workers=2)
    assert found.against is not None
    divergence = (expected.exp() * (expected - ours)).sum(-1).mean()
    assert found.against.divergence == pytest.approx(float(divergence), rel=1e-4)
    assert found.against.agreement == float((expected.argmax(-1) == ours.argmax(-1)).double().mean())
    for perplexity, log_p in ((found.perplexity, ours), (found.against.perplexity, expected)):
        loss = -log_p.gather(-1, windows[:, 1:, None]).mean()
        assert perplexity == pytest.approx(float(loss.exp()), rel=1e-4)


def test_what_cannot_be_compared_is_refused(
    llama: Path, make_model: MakeModel, text_file: Path, tmp_path: Path
) -> None:
    few = {"seqlen": 32, "windows": 1}
    with pytest.raises(InputError, match=r"--against .*: its vocabulary has 640 tokens, that of .* 512"):
        evaluate(llama, text_file, against=make_model(vocab_size=640), **few)
    with pytest.raises(InputError, match="no such folder"):
        evaluate(llama, text_file, against=tmp_path / "nowhere", **few)
    with pytest.raises(InputError, match=r"--against .*: the model's context is 16 tokens"):
        evaluate(llama, text_file, against=make_model(max_position_embeddings=16), **few)
    foreign = tmp_path / "foreign"
    shutil.copytree(llama, foreign)
    description = json.loads((foreign / "tokenizer.json").read_text())
    description["normalizer"] = {"type": "Lowercase"}
    (foreign / "tokenizer.json").write_text(json.dumps(description))
    with pytest.raises(InputError, match=r"--against .*: its tokenizer makes other tokens"):
        evaluate(llama, text_file, against=foreign, **few)
