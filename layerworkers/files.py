"""Byte ranges of files as tensors: read, written, synced, given back."""

from __future__ import annotations

import ctypes
import os
import sys
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from billhook.layerworkers.descriptors import disk_failure, open_to_write, read_into, sync_descriptor, write_from
from billhook.layerworkers.errors import DiskError

READ_PIECE_BYTES = 8 << 20
"""Bytes of one request; a longer range is read by several at a time, which keeps the disk's queue filled."""

READ_THREADS = 4
"""Requests under way at the same time."""

_readers = ThreadPoolExecutor(READ_THREADS, "read")


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
        raise DiskError(f"{path}: read failed: {error.strerror}; resume once the disk is well") from error
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
