"""What a safetensors checkpoint holds: sparsity and pattern by tensor, block and kind, ours or not."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from billhook.layerworkers.errors import NoRunError
from billhook.layerworkers.shards import DTYPES, FLOAT_DTYPES, TensorEntry, read_rows
from billhook.orchestrator.checkpoint import INDEX_NAME, SINGLE_NAME, open_checkpoint, resolve_model
from billhook.orchestrator.checkpoint import open_file as open_single_file
from billhook.orchestrator.paths import user_path

CHUNK_BYTES = 64 << 20
"""Bytes of a tensor that are held at once."""

GROUPS = (2, 4, 8, 16, 32)
"""Values of M that are tried when a pattern is looked for."""

EIGHT_BIT_FLOATS = {"F8_E4M3", "F8_E5M2"}


@dataclass(frozen=True)
class Sizes:
    """What tensors take as they are stored, and what they would take if their zeros were left out."""

    stored_bytes: int
    bitmask_bytes: int
    """Of a matrix: its other values, and one bit for each entry; of what that makes no smaller: as stored."""
    packed_bytes: int
    """Of a matrix that keeps to 2:4: half of its values, and two bits for the place of each; of others: as stored."""


@dataclass(frozen=True)
class TensorFacts:
    """One tensor of a checkpoint."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    zeros: int
    sparsity: float
    """Zeros over elements."""
    pattern: str
    """``dense`` (fewer than 1 % zeros), ``unstructured``, or the N:M that all its rows keep to.

    ``N:M transposed`` where its columns do, or those of all matrices that it stacks.
    """
    most_kept: dict[int, int]
    """Of any M consecutive entries of a row the most that are not zero, by M: it keeps to N:M where that is at most N.

    Along the columns where the pattern is transposed; empty for what is no matrix.
    """
    sizes: Sizes

    @property
    def is_matrix(self) -> bool:
        """Whether it has rows and columns."""
        return len(self.shape) > 1

    @property
    def elements(self) -> int:
        """Return how many entries it has."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class GroupFacts:
    """The matrices of a block, or those of one kind in all blocks."""

    name: str
    """What their names have in common: ``model.layers.3``, or ``model.layers.*.mlp.up_proj.weight``."""
    tensors: int
    elements: int
    zeros: int
    sparsity: float
    patterns: tuple[str, ...]
    """Those of its tensors, each once."""
    sizes: Sizes


@dataclass(frozen=True)
class Inspection:
    """A checkpoint's tensors; ``sparsity`` is over its matrices that are not dense."""

    sparsity: float
    sizes: Sizes
    """Of all tensors, also those of whole numbers, which are not among ``tensors``."""
    blocks: tuple[GroupFacts, ...]
    kinds: tuple[GroupFacts, ...]
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
    floats = FLOAT_DTYPES | EIGHT_BIT_FLOATS
    facts = tuple(_facts(entry) for entry in entries if entry.dtype in floats and entry.size_bytes)
    others = sum(entry.size_bytes for entry in entries if entry.dtype not in floats)
    sparse = [fact for fact in facts if fact.is_matrix and fact.pattern != "dense"]
    elements = sum(fact.elements for fact in sparse)
    return Inspection(
        sum(fact.zeros for fact in sparse) / elements if elements else 0.0,
        _total([*(fact.sizes for fact in facts), Sizes(others, others, others)]),
        _grouped(facts, r"^(.*?\.\d+)\..*", r"\1"),
        _grouped(facts, r"(?<=\.)\d+(?=\.)", "*"),
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


def most_kept(kept: Tensor, group: int) -> int:
    """Return the largest number of entries in any ``group`` consecutive ones of a row; ``kept`` is a mask."""
    return int(kept.reshape(-1, group).sum(dim=1).max())


def most_kept_down(kept: Tensor, group: int) -> int:
    """Return the largest number of entries in any ``group`` consecutive ones of a column; ``kept`` is a mask."""
    rows, columns = kept.shape[-2:]
    return int(kept.reshape(-1, rows // group, group, columns).sum(dim=2).max())


def _facts(entry: TensorEntry) -> TensorFacts:
    elements, nonzeros = math.prod(entry.shape), 0
    # A matrix that is stored as its transpose, alone or stacked with others, has its groups down the columns.
    along = _groups(entry.shape[-1:], len(entry.shape) > 1)
    down = _groups(entry.shape[-2:-1], len(entry.shape) > 1)
    for piece in pieces(entry, math.lcm(*GROUPS) if len(entry.shape) == 2 else 1):
        # torch compares no 8-bit floats; but for the sign, their bits say which are zero.
        kept = (piece.view(torch.uint8) & 127 if entry.dtype in EIGHT_BIT_FLOATS else piece) != 0
        nonzeros += int(kept.sum())
        along = {group: max(most, most_kept(kept, group)) for group, most in along.items()}
        down = {group: max(most, most_kept_down(kept, group)) for group, most in down.items()}
    sparsity = (elements - nonzeros) / elements
    pattern, found = _pattern(sparsity, along), along
    if pattern == "unstructured" and (other := _pattern(sparsity, down)) != pattern:
        pattern, found = f"{other} transposed", down
    sizes = _sizes(entry, nonzeros, found.get(4, 4) <= 2)
    return TensorFacts(entry.name, entry.shape, entry.dtype, elements - nonzeros, sparsity, pattern, found, sizes)


def _sizes(entry: TensorEntry, nonzeros: int, is_packable: bool) -> Sizes:
    stored, item = entry.size_bytes, DTYPES[entry.dtype].itemsize
    if len(entry.shape) < 2:
        return Sizes(stored, stored, stored)
    elements = math.prod(entry.shape)
    rows, columns = elements // entry.shape[-1], entry.shape[-1]
    bitmask = nonzeros * item + rows * -(-columns // 8)
    packed = elements // 2 * item + elements // 8 if is_packable else stored
    return Sizes(stored, min(stored, bitmask), packed)


def _total(sizes: Sequence[Sizes]) -> Sizes:
    return Sizes(
        sum(each.stored_bytes for each in sizes),
        sum(each.bitmask_bytes for each in sizes),
        sum(each.packed_bytes for each in sizes),
    )


def _grouped(facts: Sequence[TensorFacts], number: str, replacement: str) -> tuple[GroupFacts, ...]:
    """Put the matrices together whose names become the same; what has no number in its name is in no block."""
    groups: dict[str, list[TensorFacts]] = {}
    for fact in facts:
        if fact.is_matrix and re.search(r"\.\d+\.", fact.name):
            groups.setdefault(re.sub(number, replacement, fact.name), []).append(fact)
    return tuple(_group(name, groups[name]) for name in sorted(groups, key=_natural))


def _group(name: str, members: Sequence[TensorFacts]) -> GroupFacts:
    elements, zeros = sum(fact.elements for fact in members), sum(fact.zeros for fact in members)
    patterns = tuple(sorted({fact.pattern for fact in members}))
    return GroupFacts(
        name, len(members), elements, zeros, zeros / elements, patterns, _total([fact.sizes for fact in members])
    )


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """Return a key by which block 2 comes before block 10."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split(".")]


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


def _with_shape(entry: TensorEntry, shape: tuple[int, ...]) -> TensorEntry:
    return TensorEntry(entry.name, entry.path, entry.dtype, shape, entry.start_bytes, entry.stop_bytes)
