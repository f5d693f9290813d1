"""What a safetensors checkpoint holds: sparsity and pattern of every tensor, ours or not."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from billhook.layerworkers.errors import NoRunError
from billhook.layerworkers.shards import FLOAT_DTYPES, TensorEntry, read_rows
from billhook.orchestrator.checkpoint import INDEX_NAME, SINGLE_NAME, open_checkpoint, resolve_model
from billhook.orchestrator.checkpoint import open_file as open_single_file
from billhook.orchestrator.paths import user_path

CHUNK_BYTES = 64 << 20
"""Bytes of a tensor that are held at once."""

GROUPS = (2, 4, 8, 16, 32)
"""Values of M that are tried when a pattern is looked for."""


@dataclass(frozen=True)
class TensorFacts:
    """One tensor of a checkpoint."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    size_bytes: int
    sparsity: float
    """Zeros over elements."""
    pattern: str
    """``dense`` (fewer than 1 % zeros), ``unstructured``, or the N:M that all its rows keep to.

    ``N:M transposed`` where its columns do, or those of all matrices that it stacks.
    """


@dataclass(frozen=True)
class Inspection:
    """A checkpoint's tensors; ``sparsity`` is over its matrices that are not dense."""

    sparsity: float
    size_bytes: int
    tensors: tuple[TensorFacts, ...]


def inspect(checkpoint: str | Path) -> Inspection:
    """Read a checkpoint (folder, hub id or one .safetensors file) once, a piece of a tensor at a time.

    Raises:
        InputError: when it is no safetensors checkpoint.
    """
    path = user_path(checkpoint)
    if path.is_file():
        entries = list(open_single_file(path).entries)
    else:
        folder = resolve_model(checkpoint)
        if not (folder / INDEX_NAME).is_file() and not (folder / SINGLE_NAME).is_file() and any(folder.glob("*.part")):
            raise NoRunError(f"{folder}: an unfinished run; finish it with the same 'billhook prune' command")
        entries = list(open_checkpoint(folder).tensors.values())
    facts = tuple(_facts(entry) for entry in entries if entry.dtype in FLOAT_DTYPES and entry.size_bytes)
    sparse = [(fact, _elements(fact.shape)) for fact in facts if len(fact.shape) > 1 and fact.pattern != "dense"]
    elements = sum(count for _, count in sparse)
    return Inspection(
        sum(fact.sparsity * count for fact, count in sparse) / elements if elements else 0.0,
        sum(entry.size_bytes for entry in entries),
        facts,
    )


def pieces(entry: TensorEntry, multiple: int = 1) -> Iterator[Tensor]:
    """Yield the tensor in runs of rows of about CHUNK_BYTES, in its dtype on disk, as it is stored.

    multiple: rows that stay together.
    """
    if not entry.shape:
        yield read_rows(_with_shape(entry, (1,)), 0, 1)
        return
    if not entry.size_bytes:
        return
    rows = max(1, CHUNK_BYTES // (entry.size_bytes // entry.shape[0]) // multiple) * multiple
    for start in range(0, entry.shape[0], rows):
        yield read_rows(entry, start, min(start + rows, entry.shape[0]))


def most_kept(piece: Tensor, group: int) -> int:
    """Return the largest number of non-zeros in any ``group`` consecutive entries of a row."""
    return int((piece.reshape(-1, group) != 0).sum(dim=1).max())


def most_kept_down(piece: Tensor, group: int) -> int:
    """Return the largest number of non-zeros in any ``group`` consecutive entries of a column."""
    rows, columns = piece.shape[-2:]
    return int((piece.reshape(-1, rows // group, group, columns) != 0).sum(dim=2).max())


def _facts(entry: TensorEntry) -> TensorFacts:
    zeros = 0
    # A matrix that is stored as its transpose, alone or stacked with others, has its groups down the columns.
    along = _groups(entry.shape[-1:], len(entry.shape) > 1)
    down = _groups(entry.shape[-2:-1], len(entry.shape) > 1)
    for piece in pieces(entry, math.lcm(*GROUPS) if len(entry.shape) == 2 else 1):
        zeros += int((piece == 0).sum())
        along = {group: max(most, most_kept(piece, group)) for group, most in along.items()}
        down = {group: max(most, most_kept_down(piece, group)) for group, most in down.items()}
    sparsity = zeros / _elements(entry.shape)
    pattern = _pattern(sparsity, along)
    if pattern == "unstructured" and (other := _pattern(sparsity, down)) != pattern:
        pattern = f"{other} transposed"
    return TensorFacts(entry.name, entry.shape, entry.dtype, entry.size_bytes, sparsity, pattern)


def _groups(width: tuple[int, ...], matrix: bool) -> dict[int, int]:
    return {group: 0 for group in GROUPS if matrix and width and width[0] % group == 0}


def _pattern(sparsity: float, kept: dict[int, int]) -> str:
    if sparsity < 0.01:
        return "dense"
    for group, keep in kept.items():
        # An unstructured matrix of a few rows may fit a loose N:M by chance; a real one is tight.
        if keep < group and sparsity <= 1 - keep / group + 0.05:
            return f"{2 * keep}:{2 * group}" if group == 2 and kept.get(4) == 2 else f"{keep}:{group}"
    return "unstructured"


def _elements(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


def _with_shape(entry: TensorEntry, shape: tuple[int, ...]) -> TensorEntry:
    return TensorEntry(entry.name, entry.path, entry.dtype, shape, entry.start_bytes, entry.stop_bytes)
