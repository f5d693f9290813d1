"""Tiny real models, a text, and one Ray session for the whole test run."""

from __future__ import annotations

import os
import pydoc_data.topics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import TEXT

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

collect_ignore = ["nodes", "deploy", "all_families", "browser"]  # make test-nodes (needs root), -families, -browser

MakeModel = Callable[..., Path]


@pytest.fixture(scope="session")
def english() -> str:
    """Python's language reference: some 700,000 characters of English."""
    return "\n\n".join(pydoc_data.topics.topics[key] for key in sorted(pydoc_data.topics.topics))


@pytest.fixture(scope="session")
def text_file(english: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "reference.txt"
    path.write_text(english, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tokenizer(english: str) -> Any:
    """A byte-level BPE of 512 tokens, trained here."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator([english[:200_000]], vocab_size=510, show_progress=False)
    trained.add_special_tokens(["<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session")
def make_model(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> MakeModel:
    """Return a function that writes a tiny random Llama (or another family) as a Hugging Face folder."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    def make(
        family: str = "llama",
        dtype: torch.dtype = torch.bfloat16,
        shard_size: str = "100KB",
        seed: int = 0,
        **overrides: Any,
    ) -> Path:
        shape: dict[str, Any] = {
            **TEXT,
            "bos_token_id": 510,
            "eos_token_id": 511,
            "pad_token_id": 0,
            "tie_word_embeddings": False,
        }
        if "text_config" in overrides:
            shape = {name: shape[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        config = AutoConfig.for_model(family, **{**shape, **overrides})
        torch.manual_seed(seed)
        auto = AutoModelForImageTextToText if "text_config" in overrides else AutoModelForCausalLM
        model = auto.from_config(config, dtype=dtype)
        for parameter in model.parameters():
            parameter.data = (parameter.data.float() * 3 + 0.05 * torch.randn(parameter.shape)).to(dtype)
        folder = tmp_path_factory.mktemp(family)
        model.save_pretrained(folder, max_shard_size=shard_size)
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def llama(make_model: MakeModel) -> Path:
    """A three-block Llama in several shards: treat as read-only."""
    return make_model()


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One Ray session of four CPUs that every test of the run shares."""
    from billhook.cluster.session import ray_session

    with ray_session(None, cpus=4, gpus=0, object_store_bytes=200 << 20):
        yield


@pytest.fixture
def cluster_environment(ray_cluster: None) -> dict[str, str]:
    """What a process needs in its environment to join the session; its address is under ``GCS``."""
    import ray

    from billhook.cluster.session import marked_processes

    token = next(
        variable.partition(b"=")[2].decode()
        for pid in marked_processes()
        for variable in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        if variable.startswith(b"RAY_AUTH_TOKEN=")
    )
    return {
        "GCS": ray.get_runtime_context().gcs_address,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # else Ray replaces 127.0.0.1 by the outer address
        "RAY_NUM_REDIS_GET_RETRIES": "2",
    }
