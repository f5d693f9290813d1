"""The unfinished output's files as a worker sees them: on a disk of its own machine, or through somebody else."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from billhook.layerworkers.access import OpenFiles
from billhook.layerworkers.files import read_bytes


class OutputFiles(Protocol):
    """Reads and writes existing files of the output; see :class:`OpenFiles`."""

    def read(self, path: str, start_bytes: int, size_bytes: int) -> Tensor:
        """Read a byte range into a fresh uint8 tensor; raises RunError as :func:`read_bytes`."""

    def write(self, path: str, start_bytes: int, view: memoryview) -> None:
        """Write all of ``view``; raises RunError."""

    def sync(self, path: str) -> None:
        """Wait until what was written is on the disk; raises RunError."""

    def close(self, path: str) -> None:
        """Forget a file that was written to."""


class LocalFiles(OpenFiles):
    """The output on a disk that this machine sees."""

    def read(self, path: str, start_bytes: int, size_bytes: int) -> Tensor:
        """Read a byte range into a fresh uint8 tensor [size_bytes]."""
        return read_bytes(path, start_bytes, size_bytes)
