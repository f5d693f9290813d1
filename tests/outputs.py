"""What an output holds."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file


def contents(output: Path) -> dict[str, bytes]:
    """Return the bytes of all files that are promised to be the same for the same plan, the manifest included."""
    files = {path.name: path.read_bytes() for path in output.iterdir() if path.is_file()}
    return {**files, "manifest": (output / "billhook" / "manifest.json").read_bytes()}


def tensors(output: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of all shards, by name."""
    return {name: tensor for path in output.glob("*.safetensors") for name, tensor in load_file(path).items()}
