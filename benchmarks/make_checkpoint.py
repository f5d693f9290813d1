"""Write a checkpoint of any architecture and shape with random weights, shard by shard, never holding more than one.

    python benchmarks/make_checkpoint.py --architecture llama --hidden 4096 --intermediate 14336 --heads 32 \
        --kv-heads 8 --blocks 32 --vocab 32000 -o DIR

Matrices are drawn from a normal distribution of standard deviation 0.02, so that activations stay of one size; norms
are 1 and biases 0. There is no tokenizer: prune it with ``--calibration random``.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

NUMBERS = 1 << 20
"""Drawn at once."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", default="llama", help="model_type of a transformers config")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, default=3584)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=JSON", help="another key of the config")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard-gib", type=float, default=1.0)
    parser.add_argument("--output", "-o", required=True)
    arguments = parser.parse_args()
    keys: dict[str, Any] = {
        "hidden_size": arguments.hidden,
        "intermediate_size": arguments.intermediate,
        "num_attention_heads": arguments.heads,
        "num_key_value_heads": arguments.kv_heads,
        "num_hidden_layers": arguments.blocks,
        "vocab_size": arguments.vocab,
        "max_position_embeddings": arguments.context,
        "tie_word_embeddings": False,
    }
    keys |= {key: json.loads(value) for key, _, value in (text.partition("=") for text in arguments.set)}
    size = make_checkpoint(
        Path(arguments.output),
        arguments.architecture,
        keys,
        getattr(torch, arguments.dtype),
        arguments.seed,
        int(arguments.shard_gib * 2**30),
    )
    print(f"{arguments.output}: {size / 2**30:.2f} GiB")


def make_checkpoint(
    folder: Path, architecture: str, keys: dict[str, Any], dtype: torch.dtype, seed: int, shard_bytes: int
) -> int:
    """Write the checkpoint; return the bytes of its tensors."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(architecture, **keys)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    config.architectures, config.dtype = [type(model).__name__], dtype
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(seed)
    shards: list[list[str]] = [[]]
    in_shard = 0
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    for name, shape in shapes.items():
        size = math.prod(shape) * dtype.itemsize
        if shards[-1] and in_shard + size > shard_bytes:
            shards.append([])
            in_shard = 0
        shards[-1].append(name)
        in_shard += size
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(
            {name: _drawn(name, shapes[name], dtype, generator) for name in names}, folder / file, {"format": "pt"}
        )
        weight_map.update(dict.fromkeys(names, file))
    total = sum(math.prod(shape) * dtype.itemsize for shape in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    return total


def _drawn(name: str, shape: torch.Size, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    if len(shape) < 2:
        return (torch.zeros if name.endswith("bias") else torch.ones)(shape, dtype=dtype)
    tensor = torch.empty(shape, dtype=dtype)
    for part in tensor.view(-1).split(NUMBERS):
        part.copy_(torch.randn(len(part), generator=generator) * 0.02)
    return tensor


if __name__ == "__main__":
    main()
