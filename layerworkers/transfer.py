"""Reading the next block and writing the last one while a block is computed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import torch
from torch import Tensor

from billhook.layerworkers.errors import InputError
from billhook.layerworkers.files import bytes_of, open_to_write, sync_descriptor, write_from
from billhook.layerworkers.scratch import bands
from billhook.layerworkers.shards import FLOAT_DTYPES, TensorEntry, read_tensor
from billhook.layerworkers.tasks import ModuleTensor


class BlockReader:
    """Reads tensors of blocks, checks that they are finite, and can begin before they are asked for."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "read-ahead")
        self._ahead: dict[str, Future[Tensor]] = {}
        self.waited_seconds = 0.0
        """Spent in :meth:`read`."""

    def begin(self, tensors: Sequence[ModuleTensor], after: Future[None] | None = None) -> None:
        """Begin to read ``tensors``, in a thread, once ``after`` is done, successful or not."""
        if after is not None:
            self._thread.submit(wait, [after])
        for tensor in tensors:
            self._ahead[tensor.entry.name] = self._thread.submit(read_finite, tensor.entry)

    def read(self, entry: TensorEntry) -> Tensor:
        """Return a tensor in its dtype on disk, on the CPU.

        Raises:
            InputError: when it holds NaN or infinity.
            RunError: when the disk fails.
        """
        begin = time.monotonic()
        try:
            ahead = self._ahead.pop(entry.name, None)
            return read_finite(entry) if ahead is None else ahead.result()
        finally:
            self.waited_seconds += time.monotonic() - begin


class BlockWriter:
    """Writes tensors into the output's unfinished shards, in a thread, in the order in which they come.

    A shard that was opened stays open: writing goes to the file that was there, whatever takes its name later, and
    what the system could not write is told to the one who wrote it.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "write")
        self._writes: list[Future[None]] = []
        self._open: dict[str, int] = {}
        self._touched: set[str] = set()
        self._rows: dict[str, int] = {}
        self.written: Future[None] | None = None
        """Done when the data that :meth:`sync` was last called for is not needed any more."""
        self._syncing: Future[None] | None = None
        self.waited_seconds = 0.0
        """Spent in :meth:`wait`."""

    def write(self, output: str, entry: TensorEntry, data: Tensor | None) -> None:
        """Write ``data``, or where it is None the tensor as it is on disk, to its place in the output."""
        path = f"{output}/{Path(entry.path).name}.part"
        self._touched.add(path)

        def run() -> None:
            if path not in self._open:
                self._open[path] = open_to_write(path)
            tensor = read_tensor(entry) if data is None else data
            write_from(self._open[path], bytes_of(tensor), entry.start_bytes, path)

        self._writes.append(self._thread.submit(run))

    def write_row(self, entry: TensorEntry, row: int, data: Tensor) -> None:
        """Write the bytes of one row of ``entry`` to its file, at once: the data may change afterwards.

        Raises:
            RunError: when the disk is full or fails.
        """
        row_bytes = entry.size_bytes // entry.shape[0]
        assert data.nbytes == row_bytes, f"{entry.path}: rows of {row_bytes} bytes, not {data.nbytes}"
        if entry.path not in self._rows:
            self._rows[entry.path] = open_to_write(entry.path)
        view = bytes_of(data.to("cpu").contiguous())
        write_from(self._rows[entry.path], view, entry.start_bytes + row * row_bytes, entry.path)

    def sync(self, then: Callable[[], None]) -> None:
        """Begin to sync what was written since the last time, and call ``then`` once it is on the disk.

        Waits for the last time's first, so that no more than one block is under way.

        Raises:
            RunError: as :meth:`wait`.
        """
        self.wait()
        touched, self._touched = sorted(self._touched), set()
        writes, self._writes = self._writes, []
        rows, self._rows = self._rows, {}
        self.written = self._thread.submit(lambda: None)

        def run() -> None:
            for write in writes:
                write.result()
            for path in touched:
                sync_descriptor(self._open[path], path)
            for path, descriptor in rows.items():
                sync_descriptor(descriptor, path)
                os.close(descriptor)
            then()

        self._syncing = self._thread.submit(run)

    def wait_written(self) -> None:
        """Wait until the data that :meth:`sync` was last called for is not needed any more."""
        begin = time.monotonic()
        if self.written is not None:
            self.written.result()
        self.waited_seconds += time.monotonic() - begin

    def wait(self) -> None:
        """Wait until everything is on the disk that :meth:`sync` was called for.

        Raises:
            RunError: when a write or sync failed.
        """
        begin = time.monotonic()
        if self._syncing is not None:
            self._syncing.result()
            self._syncing = None
        self.waited_seconds += time.monotonic() - begin


def read_finite(entry: TensorEntry) -> Tensor:
    """Read a tensor in its dtype on disk.

    Raises:
        InputError: when it holds NaN or infinity: the tensor is named.
        RunError: when the disk fails.
    """
    tensor = read_tensor(entry)
    if entry.dtype in FLOAT_DTYPES:
        check_finite(entry, tensor)
    return tensor


def check_finite(entry: TensorEntry, rows: Tensor) -> None:
    """Check rows of a tensor, or all of it, without another copy.

    Raises:
        InputError: when they hold NaN or infinity.
    """
    flat = rows.reshape(-1)
    for start, stop in bands(flat.shape, flat.element_size()):
        if not torch.isfinite(flat[start:stop]).all():
            raise InputError(f"{entry.path}: tensor {entry.name} holds NaN or infinity; mend the source checkpoint")
