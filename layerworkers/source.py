"""Whether a folder holds the source checkpoint of a run: by hash, without reading it all."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from billhook.layerworkers.errors import CheckpointError, InputError, UnlikeNodesError
from billhook.layerworkers.shards import read_header

SAMPLES = 16
"""Places of a shard that are looked at."""

SAMPLE_BYTES = 4096


@dataclass(frozen=True)
class Source:
    """A checkpoint's files, and what they hold."""

    folder: str
    others: tuple[str, ...]
    """Config, tokenizer, code."""
    shards: tuple[str, ...]
    sha256: str
    """Of :func:`source_sha256`."""


def source_sha256(folder: Path, others: Sequence[str], shards: Sequence[str]) -> str:
    """Return a hash of config, tokenizer and code, and of the headers and 4 KiB at 16 places of each shard.

    Raises:
        InputError: when a file is not there or is no safetensors file.
    """
    digest = hashlib.sha256()
    try:
        for name in others:
            digest.update(name.encode() + hashlib.sha256((folder / name).read_bytes()).digest())
        for name in shards:
            header, _ = read_header(folder / name)
            size = (folder / name).stat().st_size
            digest.update(name.encode() + header)
            with (folder / name).open("rb") as file:
                for step in range(SAMPLES):
                    file.seek(len(header) + (size - len(header)) * step // SAMPLES)
                    digest.update(file.read(SAMPLE_BYTES))
    except OSError as error:
        raise CheckpointError(f"{error.filename}: {error.strerror}") from error
    return digest.hexdigest()


def check_source(source: Source, machine: str) -> None:
    """Check that this machine has the source.

    machine: how it is named in messages.

    Raises:
        InputError: when it has not, or another.
    """
    remedy = "every node needs the model at the same path: on a shared disk, or a copy"
    try:
        found = source_sha256(Path(source.folder), source.others, source.shards)
    except InputError as error:
        raise UnlikeNodesError(f"{machine}: {error}; {remedy}") from error
    if found != source.sha256:
        raise UnlikeNodesError(f"{machine}: {source.folder} differs from the driver's; {remedy}")
