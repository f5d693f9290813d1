"""The unfinished output as those who write there know and open it; without torch."""

from __future__ import annotations

import fcntl
import os
from dataclasses import dataclass
from pathlib import Path

from billhook.layerworkers.descriptors import disk_failure, sync_descriptor, write_from
from billhook.layerworkers.errors import DiskError, OutputGoneError


@dataclass(frozen=True)
class OutputAccess:
    """The unfinished output, as the driver sees it."""

    folder: str
    lock: str
    """File in it that whoever may write there holds a shared lock on."""
    proof: str
    """What that file holds: a worker that finds it there sees the output."""


class OpenFiles:
    """Files of the unfinished output that are written to, by path, and stay open until they are closed.

    The folder is opened once, and a shared lock held there for as long as this process lives: writing goes to the
    output that was there at first, whatever takes its name later; and what the system could not write is told to the
    one who wrote it.

    Raises:
        RunError: when the folder is not the output that is meant, or cannot be opened or locked.
    """

    def __init__(self, output: OutputAccess | None):
        """output: None: files are written wherever they are, and nothing is locked."""
        self._folder: int | None = None
        self._output, self._open = output, dict[str, int]()
        if output is None:
            return
        try:
            self._folder = os.open(output.folder, os.O_RDONLY | os.O_DIRECTORY)
            lock = os.open(Path(output.lock).relative_to(output.folder), os.O_RDWR, dir_fd=self._folder)
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            found = os.pread(lock, len(output.proof) + 1, 0)
        except OSError as error:
            raise DiskError(f"{output.lock}: cannot be locked: {error.strerror}") from error
        if found != output.proof.encode():
            raise OutputGoneError(f"{output.folder}: is not the output that this run writes")

    def write(self, path: str, start_bytes: int, view: memoryview) -> None:
        """Write all of ``view`` at an offset of an existing file.

        Raises:
            RunError: when the disk is full or fails.
        """
        if path not in self._open:
            within = Path(path) if self._output is None else Path(path).relative_to(self._output.folder)
            try:
                self._open[path] = os.open(within, os.O_WRONLY, dir_fd=self._folder)
            except OSError as error:
                raise disk_failure(path, "opening", error) from error
        write_from(self._open[path], view, start_bytes, path)

    def sync(self, path: str) -> None:
        """Wait until what was written to a file is on the disk.

        Raises:
            RunError: when the disk says that it is not.
        """
        sync_descriptor(self._open[path], path)

    def close(self, path: str) -> None:
        """Close a file."""
        os.close(self._open.pop(path))
