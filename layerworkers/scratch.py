"""Where tensors wait that the device, or memory, has no room for.

A :class:`Parking` takes a tensor's bytes and gives them back unchanged, so no result depends on what is parked.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from billhook.layerworkers.descriptors import read_into, write_from
from billhook.layerworkers.errors import DiskError
from billhook.layerworkers.files import bytes_of, punch_hole

BAND_BYTES = 16 << 20
"""Bytes of a parked tensor that are brought back at once where it is used band by band."""


class Parked(Protocol):
    """A tensor that waits elsewhere."""

    @property
    def shape(self) -> torch.Size:
        """The tensor's shape."""

    def rows(self, start: int, stop: int) -> Tensor:
        """Return rows ``start`` to ``stop``, on the CPU; they must not be written to."""

    def take(self) -> Tensor:
        """Return the whole tensor, on the CPU, and give up its place."""

    def give_up(self) -> None:
        """Give up its place: the tensor is not needed any more."""


class Parking(Protocol):
    """Where tensors may be parked."""

    def park(self, tensor: Tensor) -> Parked:
        """Store a copy of a tensor."""


class MemoryParking:
    """Parks in the memory of this process: for tensors of a GPU."""

    def park(self, tensor: Tensor) -> Parked:
        """Copy the tensor to the CPU."""
        return _InMemory(tensor.to("cpu", copy=True).contiguous())


@dataclass
class _InMemory:
    tensor: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.tensor.shape

    def rows(self, start: int, stop: int) -> Tensor:
        return self.tensor[start:stop]

    def take(self) -> Tensor:
        return self.tensor

    def give_up(self) -> None:
        self.tensor = torch.empty(0)


class DiskParking:
    """Parks in one file that has no name: it vanishes with the process, however that ends."""

    def __init__(self, folder: str):
        """Open the file in ``folder``, which is made if need be; empty: in the system's for temporary files.

        Raises:
            RunError: when that fails.
        """
        self._folder = folder = folder or tempfile.gettempdir()
        try:
            Path(folder).mkdir(parents=True, exist_ok=True, mode=0o700)
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - lives as long as this object
        except OSError as error:
            raise DiskError(f"--scratch {folder}: cannot be written to: {error.strerror}") from error
        self._free: dict[int, list[int]] = defaultdict(list)
        self._end, self._used = 0, 0
        self.peak_bytes = 0
        """Most that the file has taken on the disk."""

    def park(self, tensor: Tensor) -> Parked:
        """Write the tensor to a free place of its size, or to the end of the file.

        Raises:
            RunError: when the disk is full or fails.
        """
        data = tensor.to("cpu").contiguous()
        size = data.numel() * data.element_size()
        if self._free[size]:
            offset = self._free[size].pop()
        else:
            self._give_back()
            offset = self._end
            self._end += _pages(size)
            self._used += _pages(size)
            self.peak_bytes = max(self.peak_bytes, self._used)
        if size:
            write_from(self._file.fileno(), bytes_of(data), offset, f"--scratch {self._folder}")
        return _OnDisk(self, offset, size, data.shape, data.dtype)

    def read(self, size_bytes: int, offset: int) -> Tensor:
        """Return ``size_bytes`` bytes as uint8."""
        buffer = torch.empty(size_bytes, dtype=torch.uint8)
        if size_bytes:
            read_into(self._file.fileno(), memoryview(buffer.numpy().data), offset, f"--scratch {self._folder}")
        return buffer

    def reuse(self, size_bytes: int, offset: int) -> None:
        """Let the place be used again."""
        self._free[size_bytes].append(offset)

    def _give_back(self) -> None:
        """Give the free places' blocks back to the file system before the file grows; they are not used again.

        Where it does not take them, they stay free places.
        """
        for size, offsets in self._free.items():
            given = [offset for offset in offsets if punch_hole(self._file.fileno(), offset, _pages(size))]
            self._used -= _pages(size) * len(given)
            self._free[size] = [offset for offset in offsets if offset not in given]


def _pages(size_bytes: int) -> int:
    return -(-size_bytes // 4096) * 4096


@dataclass
class _OnDisk:
    parking: DiskParking
    offset: int
    size_bytes: int
    shape: torch.Size
    dtype: torch.dtype

    def rows(self, start: int, stop: int) -> Tensor:
        row_bytes = self.size_bytes // self.shape[0]
        data = self.parking.read((stop - start) * row_bytes, self.offset + start * row_bytes)
        return data.view(self.dtype).view(stop - start, *self.shape[1:])

    def take(self) -> Tensor:
        data = self.parking.read(self.size_bytes, self.offset).view(self.dtype).view(self.shape)
        self.give_up()
        return data

    def give_up(self) -> None:
        self.parking.reuse(self.size_bytes, self.offset)


def bands(shape: torch.Size | tuple[int, ...], item_bytes: int = 4) -> Iterator[tuple[int, int]]:
    """Yield ``(start, stop)`` of consecutive rows of a tensor of this shape, about :data:`BAND_BYTES` at a time."""
    rows = shape[0]
    row_bytes = item_bytes * (torch.Size(shape).numel() // max(rows, 1))
    step = max(1, BAND_BYTES // max(row_bytes, 1))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)
