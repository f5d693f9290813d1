"""Positioned reads and writes that are complete or fail, and syncing."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import sys
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from billhook.layerworkers.errors import RunError

READ_PIECE_BYTES = 8 << 20
"""Bytes of one request; a longer range is read by several at a time, which keeps the disk's queue filled."""

READ_THREADS = 4
"""Requests under way at the same time."""

_readers = ThreadPoolExecutor(READ_THREADS, "read")


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
                raise RunError(f"{name}: ends at byte {start_bytes + done}, expected {start_bytes + len(view)}")
            done += count
    except OSError as error:
        raise RunError(f"{name}: read failed: {error.strerror}; resume once the disk is well") from error


def read_bytes(path: str, start_bytes: int, size_bytes: int) -> Tensor:
    """Read a byte range into a fresh uint8 tensor [size_bytes].

    Raises:
        RunError: when the file ends early or cannot be read.
    """
    buffer = torch.empty(size_bytes, dtype=torch.uint8)
    view = memoryview(buffer.numpy().data)
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise RunError(f"{path}: read failed: {error.strerror}; resume once the disk is well") from error
    try:
        if size_bytes <= READ_PIECE_BYTES:
            read_into(descriptor, view, start_bytes, path)
        else:
            pieces = [
                _readers.submit(
                    read_into, descriptor, view[start : start + READ_PIECE_BYTES], start_bytes + start, path
                )
                for start in range(0, size_bytes, READ_PIECE_BYTES)
            ]
            failures = [failure for piece in pieces if (failure := piece.exception()) is not None]
            if failures:
                raise failures[0]
    finally:
        os.close(descriptor)
    return buffer


def disk_failure(name: str, doing: str, error: OSError, descriptor: int | None = None) -> RunError:
    """Return what a user is told when ``doing`` something with a file failed; a full disk is told with what is free.

    name: the file's path, or what the user knows it as; then an open ``descriptor`` of it tells its disk.
    """
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        facts = os.statvfs(os.path.dirname(name)) if descriptor is None else os.fstatvfs(descriptor)
        free = facts.f_bavail * facts.f_frsize
        return RunError(
            f"{name}: the disk is full: {doing} failed, {free} bytes are free; make room and resume with the same "
            "command"
        )
    return RunError(f"{name}: {doing} failed: {error.strerror}; resume with the same command once mended")


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


def write_bytes(path: str, start_bytes: int, data: Tensor) -> None:
    """Write a contiguous CPU tensor's bytes at an offset of an existing file.

    Raises:
        RunError: when the disk is full or fails.
    """
    descriptor = open_to_write(path)
    try:
        write_from(descriptor, bytes_of(data), start_bytes, path)
    finally:
        os.close(descriptor)


def bytes_of(data: Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor, without a copy."""
    return memoryview(data.flatten().view(torch.uint8).numpy().data)


def punch_hole(descriptor: int, start_bytes: int, size_bytes: int) -> bool:
    """Give a range of an open file back to the file system; False where that cannot be done."""
    fallocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None) if sys.platform == "linux" else None
    if fallocate is None:
        return False
    keep_size, punch = 1, 2
    offsets = ctypes.c_int64(start_bytes), ctypes.c_int64(size_bytes)
    return bool(fallocate(descriptor, keep_size | punch, *offsets) == 0)


def shared_lock(path: str) -> int:
    """Return a descriptor that holds a shared lock on the file until it is closed or the process ends.

    Raises:
        RunError: when the file cannot be opened, or is locked exclusively.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        raise RunError(f"{path}: cannot be locked: {error.strerror}") from error
    return descriptor


def sync_file(path: str) -> None:
    """Wait until the file's data is on the disk.

    Raises:
        RunError: when the disk says that it is not.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise disk_failure(path, "syncing", error) from error
    try:
        sync_descriptor(descriptor, path)
    finally:
        os.close(descriptor)


def sync_descriptor(descriptor: int, path: str) -> None:
    """Wait until what was written to an open file is on the disk.

    Raises:
        RunError: when the disk says that it is not.
    """
    try:
        os.fsync(descriptor)
    except OSError as error:
        raise disk_failure(path, "syncing", error) from error
