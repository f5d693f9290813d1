"""Positioned reads and writes that are complete or fail, and syncing: by open files, without torch."""

from __future__ import annotations

import errno
import os

from billhook.layerworkers.errors import DiskError, DiskFullError, RunError


def read_into(descriptor: int, view: memoryview, start_bytes: int, name: str) -> None:
    """Fill ``view`` from an offset of an open file.

    Raises:
        RunError: when the file ends early or cannot be read; ``name`` says which.
    """
    done = 0
    try:
        while done < len(view):
            count = os.preadv(descriptor, [view[done:]], start_bytes + done)
            if count == 0:
                raise DiskError(f"{name}: ends at byte {start_bytes + done}, expected {start_bytes + len(view)}")
            done += count
    except OSError as error:
        raise DiskError(f"{name}: read failed: {error.strerror}; resume once the disk is well") from error


def disk_failure(name: str, doing: str, error: OSError, descriptor: int | None = None) -> RunError:
    """Return what a user is told when ``doing`` something with a file failed; a full disk is told with what is free.

    name: the file's path, or what the user knows it as; then an open ``descriptor`` of it tells its disk.
    """
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        try:
            facts = os.statvfs(os.path.dirname(name) or ".") if descriptor is None else os.fstatvfs(descriptor)
            free = f", {facts.f_bavail * facts.f_frsize} bytes are free"
        except OSError:  # the folder is gone, too
            free = ""
        return DiskFullError(
            f"{name}: the disk is full: {doing} failed{free}; make room and resume with the same command"
        )
    return DiskError(f"{name}: {doing} failed: {error.strerror}; resume with the same command once mended")


def write_from(descriptor: int, view: memoryview, start_bytes: int, name: str) -> None:
    """Write all of ``view`` to an offset of an open file.

    Raises:
        RunError: when the disk is full or fails; ``name`` says which file.
    """
    done = 0
    try:
        while done < len(view):
            done += os.pwrite(descriptor, view[done:], start_bytes + done)
    except OSError as error:
        raise disk_failure(name, f"writing {len(view) - done} bytes", error, descriptor) from error


def open_to_write(path: str) -> int:
    """Return a descriptor of an existing file.

    Raises:
        RunError: when it cannot be opened.
    """
    try:
        return os.open(path, os.O_WRONLY)
    except OSError as error:
        raise disk_failure(path, "opening", error) from error


def sync_descriptor(descriptor: int, path: str) -> None:
    """Wait until what was written to an open file is on the disk.

    Raises:
        RunError: when the disk says that it is not.
    """
    try:
        os.fsync(descriptor)
    except OSError as error:
        raise disk_failure(path, "syncing", error) from error
