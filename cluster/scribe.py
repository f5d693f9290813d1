"""The actor on the driver's node that reads and writes the output for workers that do not see it: it needs no torch."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayTaskError

from billhook.layerworkers.access import OpenFiles, OutputAccess
from billhook.layerworkers.descriptors import read_into
from billhook.layerworkers.errors import DiskError, RunError

if TYPE_CHECKING:
    from torch import Tensor

PIECE_BYTES = 16 << 20
"""Most that travels at once."""


@ray.remote(num_cpus=0)
class Scribe:
    """Does as it is told by several workers, one call after the other."""

    def __init__(self, output: OutputAccess, workers: int):
        self._files = [OpenFiles(output) for _ in range(workers)]

    def read(self, path: str, start_bytes: int, size_bytes: int) -> Any:
        """Return a byte range as a numpy array."""
        import numpy as np

        data = np.empty(size_bytes, dtype=np.uint8)
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise DiskError(f"{path}: read failed: {error.strerror}; resume once the disk is well") from error
        try:
            read_into(descriptor, memoryview(data.data), start_bytes, path)
        finally:
            os.close(descriptor)
        return data

    def write(self, rank: int, path: str, start_bytes: int, data: Any) -> None:
        """Write a numpy array's bytes for the worker of a rank."""
        self._files[rank].write(path, start_bytes, memoryview(data.data))

    def sync(self, rank: int, path: str) -> None:
        """Sync what was written for a rank."""
        self._files[rank].sync(path)

    def close(self, rank: int, path: str) -> None:
        """Close what was written for a rank."""
        self._files[rank].close(path)


class RemoteFiles:
    """The output through a :class:`Scribe`; see :class:`billhook.layerworkers.output_files.OutputFiles`."""

    def __init__(self, scribe: Any, rank: int):
        self._scribe, self._rank = scribe, rank

    def read(self, path: str, start_bytes: int, size_bytes: int) -> Tensor:
        """Read a byte range into a fresh uint8 tensor [size_bytes], a piece at a time."""
        import torch

        data = torch.empty(size_bytes, dtype=torch.uint8)
        for start in range(0, size_bytes, PIECE_BYTES):
            piece = data[start : start + PIECE_BYTES]
            piece.numpy()[:] = _answer(self._scribe.read.remote(path, start_bytes + start, len(piece)))
        return data

    def write(self, path: str, start_bytes: int, view: memoryview) -> None:
        """Write all of ``view``, a piece at a time."""
        import numpy as np

        for start in range(0, max(len(view), 1), PIECE_BYTES):  # what is empty is synced like all the rest
            piece = np.frombuffer(view[start : start + PIECE_BYTES], dtype=np.uint8)
            _answer(self._scribe.write.remote(self._rank, path, start_bytes + start, piece))

    def sync(self, path: str) -> None:
        """Wait until what was written is on the disk."""
        _answer(self._scribe.sync.remote(self._rank, path))

    def close(self, path: str) -> None:
        """Close a file that was written to."""
        _answer(self._scribe.close.remote(self._rank, path))


def _answer(call: Any) -> Any:
    """Wait for the scribe.

    Raises:
        RunError: as the scribe does.
    """
    try:
        return ray.get(call)
    except RayTaskError as error:
        if isinstance(error.cause, RunError):
            raise type(error.cause)(str(error.cause)) from None
        raise
