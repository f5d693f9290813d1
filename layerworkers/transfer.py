"""Reading the next block and writing the last one while a block is computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import torch
from torch import Tensor

from billhook.layerworkers.errors import CheckpointError
from billhook.layerworkers.files import bytes_of, read_bytes
from billhook.layerworkers.output_files import OutputFiles
from billhook.layerworkers.scratch import bands
from billhook.layerworkers.shards import FLOAT_DTYPES, Read, TensorEntry, as_stored, read_tensor
from billhook.layerworkers.tasks import ModuleTensor


class BlockReader:
    """Reads tensors of blocks, checks that they are finite, and can begin before they are asked for."""

    def __init__(self, output: str, files: OutputFiles):
        """output: a folder whose files are read through ``files``; empty: none is."""
        self._output, self._files = output, files
        self._thread = ThreadPoolExecutor(1, "read-ahead")
        # A replayed block is read twice, dense and as it is in the output: the same names in other files.
        self._ahead: dict[TensorEntry, Future[Tensor]] = {}

    def begin(self, tensors: Sequence[ModuleTensor], after: Future[None] | None = None) -> None:
        """Begin to read ``tensors``, in a thread, once ``after`` is done, successful or not."""
        if after is not None:
            self._thread.submit(wait, [after])
        for tensor in tensors:
            self._ahead[tensor.entry] = self._thread.submit(read_finite, tensor.entry, self.bytes_of)

    def read(self, entry: TensorEntry) -> Tensor:
        """Return a tensor in its dtype on disk, on the CPU.

        Raises:
            InputError: when it holds NaN or infinity.
            RunError: when the disk fails.
        """
        ahead = self._ahead.pop(entry, None)
        return read_finite(entry, self.bytes_of) if ahead is None else ahead.result()

    def bytes_of(self, path: str, start_bytes: int, size_bytes: int) -> Tensor:
        """Return a byte range as uint8, of the source or of the output."""
        ours = self._output and path.startswith(f"{self._output}/")
        return (self._files.read if ours else read_bytes)(path, start_bytes, size_bytes)


class BlockWriter:
    """Writes tensors into the output's unfinished shards, in a thread, in the order in which they come."""

    def __init__(self, files: OutputFiles):
        self._files = files
        self._thread = ThreadPoolExecutor(1, "write")
        self._writes: list[Future[None]] = []
        self._touched: set[str] = set()
        self._rows: set[str] = set()
        self.written: Future[None] | None = None
        """Done when the data that :meth:`sync` was last called for is not needed any more."""
        self._syncing: Future[None] | None = None

    def write(self, output: str, entry: TensorEntry, data: Tensor | None) -> None:
        """Write ``data``, or where it is None the tensor as it is on disk, to its place in the output."""
        path = f"{output}/{Path(entry.path).name}.part"
        self._touched.add(path)

        def run() -> None:
            tensor = read_tensor(entry) if data is None else data
            self._files.write(path, entry.start_bytes, bytes_of(as_stored(entry, tensor)))

        self._writes.append(self._thread.submit(run))

    def write_rows(self, entry: TensorEntry, first: int, data: Tensor) -> None:
        """Write the bytes of rows of ``entry``, from ``first`` on, at once: the data may change afterwards.

        Raises:
            RunError: when the disk is full or fails.
        """
        row_bytes = entry.size_bytes // entry.shape[0]
        assert data.nbytes % row_bytes == 0, f"{entry.path}: rows of {row_bytes} bytes, not {data.nbytes}"
        self._rows.add(entry.path)
        view = bytes_of(data.to("cpu").contiguous())
        self._files.write(entry.path, entry.start_bytes + first * row_bytes, view)

    def sync(self, then: Callable[[], None]) -> None:
        """Begin to sync what was written since the last time, and call ``then`` once it is on the disk.

        Waits for the last time's first, so that no more than one block is under way.

        Raises:
            RunError: as :meth:`wait`.
        """
        self.wait()
        touched, self._touched = sorted(self._touched), set()
        writes, self._writes = self._writes, []
        rows, self._rows = sorted(self._rows), set()
        self.written = self._thread.submit(lambda: None)

        def run() -> None:
            for write in writes:
                write.result()
            for path in touched:
                self._files.sync(path)
            for path in rows:
                self._files.sync(path)
                self._files.close(path)
            then()

        self._syncing = self._thread.submit(run)

    def wait_written(self) -> None:
        """Wait until the data that :meth:`sync` was last called for is not needed any more."""
        if self.written is not None:
            self.written.result()

    def wait(self) -> None:
        """Wait until everything is on the disk that :meth:`sync` was called for.

        Raises:
            RunError: when a write or sync failed.
        """
        if self._syncing is not None:
            self._syncing.result()
            self._syncing = None


def read_finite(entry: TensorEntry, read: Read) -> Tensor:
    """Read a tensor in its dtype on disk.

    Raises:
        InputError: when it holds NaN or infinity: the tensor is named.
        RunError: when the disk fails.
    """
    tensor = read_tensor(entry, read)
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
            raise CheckpointError(
                f"{entry.path}: tensor {entry.name} holds NaN or infinity; mend the source checkpoint"
            )
