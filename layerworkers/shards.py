"""Tensors of a safetensors shard by byte range: headers, whole tensors, rows.

Nothing is mapped: a mapped page counts as memory of the process, a buffer that was read does only while it is held.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from billhook.layerworkers.errors import CheckpointError
from billhook.layerworkers.files import read_bytes

Read = Callable[[str, int, int], Tensor]
"""``read(path, start_bytes, size_bytes)`` returns a byte range as a fresh uint8 tensor; see :func:`read_bytes`."""

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""safetensors' dtype names that billhook reads as numbers; tensors of any other dtype are copied as bytes."""

FLOAT_DTYPES = {"F64", "F32", "F16", "BF16"}
"""Dtypes in which a linear can be pruned."""

MAX_HEADER_BYTES = 100 << 20
"""The safetensors format's own limit."""


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies on disk."""

    name: str
    path: str
    """The shard that holds it."""
    dtype: str
    """As in the safetensors header, for example ``BF16``."""
    shape: tuple[int, ...]
    start_bytes: int
    """Offset from the beginning of the file."""
    stop_bytes: int
    transposed: bool = False
    """Whether it is stored as the transpose of the matrix that is meant: of a linear's weight [inputs, outputs]."""

    @property
    def size_bytes(self) -> int:
        """Bytes of data."""
        return self.stop_bytes - self.start_bytes

    @property
    def meant_shape(self) -> tuple[int, ...]:
        """Shape of the tensor that is meant."""
        return self.shape[::-1] if self.transposed else self.shape

    def item(self, number: int) -> TensorEntry:
        """Return the entry of one item along the first dimension, which has a name of its own: ``name[number]``."""
        size = self.size_bytes // self.shape[0]
        start = self.start_bytes + number * size
        return replace(
            self, name=f"{self.name}[{number}]", shape=self.shape[1:], start_bytes=start, stop_bytes=start + size
        )


def read_header(path: Path) -> tuple[bytes, list[TensorEntry]]:
    """Return the raw header of a shard (length field included) and its tensors, in file order.

    Raises:
        InputError: when the file is no safetensors file or is truncated.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise CheckpointError(f"{path}: not a safetensors file: {size} bytes, expected at least 8; copy it again")
        (length,) = struct.unpack("<Q", prefix)
        if length > min(MAX_HEADER_BYTES, size - 8):
            raise CheckpointError(
                f"{path}: its header claims {length} bytes, the file has {size}: not a safetensors file, or truncated; "
                "copy it again"
            )
        raw = file.read(length)
    try:
        header = json.loads(raw)
        entries = [
            TensorEntry(
                name,
                str(path),
                info["dtype"],
                tuple(info["shape"]),
                8 + length + info["data_offsets"][0],
                8 + length + info["data_offsets"][1],
            )
            for name, info in header.items()
            if name != "__metadata__"
        ]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise CheckpointError(f"{path}: the safetensors header cannot be read ({error}); copy it again") from error
    entries.sort(key=lambda entry: (entry.start_bytes, entry.stop_bytes))
    end = entries[-1].stop_bytes if entries else 8 + length
    if end != size:
        raise CheckpointError(
            f"{path}: truncated or padded: its header describes {end} bytes, the file has {size}; copy it again"
        )
    return prefix + raw, entries


def read_tensor(entry: TensorEntry, read: Read = read_bytes) -> Tensor:
    """Read one tensor as it is meant, in its dtype on disk, on the CPU.

    Of a dtype that torch lacks, its bytes are returned as uint8 [size].
    """
    data = read(entry.path, entry.start_bytes, entry.size_bytes)
    dtype = DTYPES.get(entry.dtype)
    if dtype is None:
        return data
    stored = data.view(dtype).view(entry.shape)
    return stored.t().contiguous() if entry.transposed else stored


def as_stored(entry: TensorEntry, tensor: Tensor) -> Tensor:
    """Return a tensor that :func:`read_tensor` gave, or another in its place, as it lies on disk."""
    return tensor.t().contiguous() if entry.transposed else tensor


def read_rows(entry: TensorEntry, start: int, stop: int, read: Read = read_bytes) -> Tensor:
    """Read rows ``start`` to ``stop`` of a tensor whose first dimension is the rows, in its dtype on disk."""
    assert 0 <= start <= stop <= entry.shape[0], f"{entry.name}: rows {start} to {stop} of {entry.shape[0]}"
    row_bytes = entry.size_bytes // entry.shape[0]
    data = read(entry.path, entry.start_bytes + start * row_bytes, (stop - start) * row_bytes)
    return data.view(DTYPES[entry.dtype]).view(stop - start, *entry.shape[1:])
