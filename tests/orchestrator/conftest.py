"""Shapes of real models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shape_of_8b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the config of two blocks of an 8B Llama, in bfloat16, and nothing else."""
    folder = tmp_path_factory.mktemp("config")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_hidden_layers": 2,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def finished(llama: Path, ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished output of a 2:4 run: treat as read-only."""
    from billhook.orchestrator import prune

    out = tmp_path_factory.mktemp("finished") / "out"
    return prune(llama, out, method="magnitude", pattern="2:4", exclude=("down_proj",), workers=1).output


@pytest.fixture
def out(finished: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may spoil."""
    return Path(shutil.copytree(finished, tmp_path / "out"))
