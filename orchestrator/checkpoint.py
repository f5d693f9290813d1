"""The source checkpoint: which files it has, which tensors they hold, and what else travels along."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from billhook.layerworkers.errors import CheckpointError, UnsupportedModelError
from billhook.layerworkers.shards import DTYPES, TensorEntry, read_header
from billhook.layerworkers.source import Source, source_sha256
from billhook.orchestrator.paths import user_path

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".part"}
"""Files with these suffixes hold weights: those in the index are rewritten, others are not carried over."""


@dataclass(frozen=True)
class Shard:
    """One safetensors file of a checkpoint."""

    name: str
    header: bytes
    """Length field and JSON, as they are in the file: a shard of the output begins with the same bytes."""
    entries: tuple[TensorEntry, ...]
    size_bytes: int


def float_shard(folder: Path, name: str, dtype: str, shapes: Mapping[str, tuple[int, ...]]) -> Shard:
    """Return a shard to be written, of tensors of one dtype (``F32``, ``BF16``), one behind the other."""
    header: dict[str, Any] = {}
    end = 0
    for key, shape in shapes.items():
        begin, end = end, end + DTYPES[dtype].itemsize * math.prod(shape)
        header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    body = json.dumps(header).encode()
    raw = body.ljust(-(-len(body) // 8) * 8)
    first = 8 + len(raw)
    entries = tuple(
        TensorEntry(
            key, str(folder / name), dtype, tuple(each["shape"]), *(first + offset for offset in each["data_offsets"])
        )
        for key, each in header.items()
    )
    return Shard(name, len(raw).to_bytes(8, "little") + raw, entries, first + end)


@dataclass(frozen=True)
class Checkpoint:
    """A folder of safetensors shards with their index, config and tokenizer."""

    folder: Path
    shards: tuple[Shard, ...]
    others: tuple[str, ...]
    """Names of the files beside the shards that are carried over (config, tokenizer, index, code, licence)."""

    @cached_property
    def tensors(self) -> Mapping[str, TensorEntry]:
        """All tensors by name."""
        return {entry.name: entry for shard in self.shards for entry in shard.entries}

    @property
    def size_bytes(self) -> int:
        """Bytes of all shards."""
        return sum(shard.size_bytes for shard in self.shards)

    def source(self) -> Source:
        """Return how workers find this checkpoint and make sure that it is this one."""
        shards = tuple(shard.name for shard in self.shards)
        return Source(str(self.folder), self.others, shards, source_sha256(self.folder, self.others, shards))


LEGAL = ("README.md", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
"""What says under which terms a model may be used."""


def resolve_model(model: str | Path) -> Path:
    """Return the folder of a model given as a folder or as a Hugging Face hub id (downloaded into the hub's cache).

    Raises:
        InputError: when there is no such folder, or the hub does not answer.
    """
    folder = user_path(model)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"{model}: is a file; expected a Hugging Face model folder or a hub id")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(model)) is None or str(model).startswith("."):
        raise CheckpointError(
            f"{model}: no such folder; expected a Hugging Face model folder or a hub id such as org/name"
        )
    return _download(str(model))


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                hub_id, allow_patterns=["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py", *LEGAL]
            )
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{hub_id}: no such folder, and the Hugging Face hub gave no model of this name: {first_line}"
        ) from error


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json as plain JSON.

    Raises:
        InputError: when it is missing or no JSON object, or says that the model is quantised.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder}: no config.json; expected a Hugging Face model folder") from error
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(config).__name__}")
    quantization = config.get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else quantization
        raise UnsupportedModelError(
            f"{path}: quantization_config names the method {method!r}; quantised weights cannot be pruned. Load the "
            "model with AutoModelForCausalLM.from_pretrained(..., dtype='bfloat16'), call model.dequantize(), save it "
            "with save_pretrained, and prune that"
        )
    return config


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read the index and all headers; no tensor data is read.

    Raises:
        InputError: for an empty folder, no safetensors, a shard that is missing, truncated or outside the folder, or
            an index that disagrees with the shards.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    files = sorted(path.name for path in folder.iterdir())
    if not files:
        raise CheckpointError(f"{folder}: the folder is empty; expected a Hugging Face model folder")
    weight_map = _read_index(folder / INDEX_NAME) if INDEX_NAME in files else None
    if weight_map is None and SINGLE_NAME not in files:
        _refuse_without_safetensors(folder, files)
    names = sorted(set(weight_map.values())) if weight_map is not None else [SINGLE_NAME]
    shards = tuple(_open_shard(folder, name) for name in names)
    _check_names(folder, shards, weight_map)
    others = tuple(name for name in files if (folder / name).is_file() and Path(name).suffix not in WEIGHT_SUFFIXES)
    return Checkpoint(folder, shards, others)


def has_weights(folder: Path) -> bool:
    """Whether the folder holds weights of any kind, or an index of them."""
    return any(path.suffix in WEIGHT_SUFFIXES or path.name == INDEX_NAME for path in folder.iterdir())


def imagined_checkpoint(folder: Path, parameters: Mapping[str, tuple[int, ...]], dtype: str) -> Checkpoint:
    """Return the checkpoint that a folder without weights would hold: one shard with these parameters."""
    entries, end = [], 0
    item_bytes = DTYPES[dtype].itemsize
    for name, shape in parameters.items():
        start, end = end, end + item_bytes * math.prod(shape)
        entries.append(TensorEntry(name, str(folder / SINGLE_NAME), dtype, shape, start, end))
    others = tuple(sorted(path.name for path in folder.iterdir() if path.is_file()))
    return Checkpoint(folder, (Shard(SINGLE_NAME, b"", tuple(entries), end),), others)


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError, OSError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as a safetensors index: {error!r}") from error
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{path}: weight_map must map tensor names to file names")
    for tensor, name in weight_map.items():
        if Path(name).name != name or name in {".", ".."} or Path(name).suffix != ".safetensors":
            raise CheckpointError(
                f"{path}: tensor {tensor} lies in {name!r}; expected the plain name of a .safetensors file "
                "in the folder"
            )
    return weight_map


def _refuse_without_safetensors(folder: Path, files: list[str]) -> None:
    pickles = [name for name in files if Path(name).suffix in {".bin", ".pt", ".pth", ".ckpt"}]
    if pickles:
        raise UnsupportedModelError(
            f"{folder}: only pickled weights ({pickles[0]}), which run code when they are read; convert them with "
            "AutoModelForCausalLM.from_pretrained(...).save_pretrained(...), which writes safetensors"
        )
    ggufs = [name for name in files if name.endswith(".gguf")]
    if ggufs:
        raise UnsupportedModelError(
            f"{folder}: only GGUF weights ({ggufs[0]}); load them with from_pretrained(..., gguf_file={ggufs[0]!r}) "
            "and save the result as safetensors (examples/demo.py does so)"
        )
    raise CheckpointError(f"{folder}: neither {INDEX_NAME} nor {SINGLE_NAME}; expected a Hugging Face model folder")


def open_file(path: Path) -> Shard:
    """Read and check one safetensors file's header.

    Raises:
        InputError: when the file is no valid safetensors file or is truncated.
    """
    try:
        header, entries = read_header(path)
        size = os.stat(path).st_size
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    _validate(path)
    for entry in entries:
        if not entry.name.isprintable():  # a name is shown on terminals, which obey what they are told
            raise CheckpointError(f"{path}: the tensor name {entry.name!r} holds characters that cannot be shown")
    return Shard(path.name, header, tuple(entries), size)


def _open_shard(folder: Path, name: str) -> Shard:
    path = folder / name
    if not path.is_file():
        raise CheckpointError(f"{path}: the index names this shard, but it is missing; download it again")
    # The hub's cache holds links to files elsewhere in the cache: a link may leave the folder, a name may not.
    return open_file(path)


def _validate(path: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt", backend="pread"):
            pass
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a valid safetensors file: {error}; copy it again") from error


def _check_names(folder: Path, shards: tuple[Shard, ...], weight_map: dict[str, str] | None) -> None:
    found: dict[str, str] = {}
    for shard in shards:
        for entry in shard.entries:
            if entry.name in found:
                raise CheckpointError(
                    f"{folder}: tensor {entry.name} lies in both {found[entry.name]} and {shard.name}"
                )
            found[entry.name] = shard.name
    if weight_map is None:
        return
    for tensor, name in weight_map.items():
        if found.get(tensor) != name:
            where = f"lies in {found[tensor]}" if tensor in found else "is in no shard"
            raise CheckpointError(f"{folder / INDEX_NAME}: tensor {tensor} should lie in {name}, but it {where}")
