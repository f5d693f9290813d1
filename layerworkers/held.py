"""What a worker holds from call to call: the skeleton, the files, its samples and their hidden states, one block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from billhook.layerworkers.activations import Activations
from billhook.layerworkers.allocator import return_free_pages
from billhook.layerworkers.block_facts import Arguments
from billhook.layerworkers.collective import Collective, Counted
from billhook.layerworkers.errors import BlockLostError, UnsupportedModelError
from billhook.layerworkers.head import Head
from billhook.layerworkers.output_files import LocalFiles, OutputFiles
from billhook.layerworkers.scratch import DiskParking, MemoryParking, Parking
from billhook.layerworkers.shards import TensorEntry, read_rows
from billhook.layerworkers.skeleton import Skeleton, same_arguments
from billhook.layerworkers.stopwatch import Stopwatch
from billhook.layerworkers.tasks import ModuleTensor, Sample, StemTask, WorkerSetup
from billhook.layerworkers.transfer import BlockReader, BlockWriter, check_finite


class Held:
    """What the functions that take a block in hand work on.

    ``hidden`` are the samples' hidden states before the next block, ``dense`` those of the dense stream, if there is
    one.
    """

    def __init__(self, setup: WorkerSetup, group: Collective, synced: Callable[[int], None], files: OutputFiles | None):
        """synced, files: as of :class:`billhook.layerworkers.worker.BlockWorker`."""
        self.setup, self.synced = setup, synced
        self.watch = Stopwatch()
        self.group = Counted(group, self._count_moved, self.watch)
        self.moved_bytes = 0
        self.device = torch.device(setup.device)
        self.skeleton = Skeleton(
            Path(setup.source.folder),
            getattr(torch, setup.dtype),
            self.device,
            setup.trust_remote_code,
            setup.separate_experts,
            setup.route_all,
        )
        files = files or LocalFiles(setup.output)
        self.reader = BlockReader(setup.output.folder if setup.output is not None else "", files)
        self.writer = BlockWriter(files)
        self.samples: list[Sample] = []
        self.hidden, self.dense = Activations(self.device, None), Activations(self.device, None)
        self._arguments: list[Arguments] | None = None

    def start(self, task: StemTask, samples: Sequence[Sample]) -> None:
        """Embed the samples (consecutive, in order, all of one length) and learn the blocks' arguments.

        Raises:
            InputError: when a tensor holds NaN, or a block's arguments depend on the tokens.
        """
        self._stem, self.head = task, Head(task.head)
        for tensor in task.tensors:
            self.skeleton.set_parameter(tensor.module_name, self.reader.read(tensor.entry))
        self.samples, self._arguments = list(samples), None
        self.hidden, self.dense = self.new_stream(), self.new_stream()
        for sample in self.samples:
            tokens = torch.tensor(sample.tokens, dtype=torch.int64)
            hidden, arguments = self.skeleton.begin(tokens, self._embedding_rows)
            self.hidden.append(hidden)
            if self.setup.dense_stream:
                self.dense.append(hidden.clone())
            if self._arguments is None:
                self._arguments = arguments
            elif not same_arguments(self._arguments, arguments):
                raise UnsupportedModelError(
                    f"{type(self.skeleton.model).__name__}: the blocks' arguments depend on the tokens; "
                    "this architecture is not supported yet"
                )

    @property
    def indices(self) -> list[int]:
        """The numbers of the samples, among those of all workers."""
        return [sample.index for sample in self.samples]

    @property
    def streams(self) -> list[Activations]:
        """The hidden states that go from block to block."""
        return [self.hidden, self.dense] if self.setup.dense_stream else [self.hidden]

    def new_stream(self) -> Activations:
        """Return room for hidden states, where those of the samples are kept."""
        return Activations(self.device, self.parking(self.setup.activations))

    def copied_inputs(self) -> Activations:
        """Return copies of the samples' hidden states: those are overwritten."""
        copies = self.new_stream()
        for hidden in self.hidden:
            copies.append(hidden.clone())
        return copies

    def kept_rows(self, entry: TensorEntry) -> Iterator[tuple[Activations, int, int]]:
        """Yield which hidden state of which stream is which row of kept inputs: (stream, row, position)."""
        for number, states in enumerate(self.streams):
            first = number * (entry.shape[0] // len(self.streams))
            for position, sample in enumerate(self.samples):
                yield states, first + sample.index, position

    def arguments_of(self, index: int) -> Arguments | None:
        """Return what block ``index`` is given beside the hidden states; None where there are no samples."""
        return None if self._arguments is None else self._arguments[index]

    def load(self, tensors: Sequence[ModuleTensor]) -> dict[str, Tensor]:
        """Read a block's tensors into the module; return them as on disk, by name."""
        disk: dict[str, Tensor] = {}
        for tensor in tensors:
            with self.watch.part("files"):
                disk[tensor.entry.name] = self.reader.read(tensor.entry)
            self.skeleton.set_parameter(tensor.module_name, disk[tensor.entry.name])
        return disk

    def drop_block(self, index: int) -> None:
        """Forget a block's tensors."""
        self.skeleton.drop_block(index)
        return_free_pages()

    def check_hidden(self, index: int) -> None:
        """Check what left block ``index``.

        Raises:
            RunError: when it is not finite.
        """
        for states in self.streams:
            self.check_states(index, states)

    def check_states(self, index: int, states: Activations) -> None:
        """Check the same of one stream."""
        for sample, hidden in zip(self.samples, states, strict=True):
            if not torch.isfinite(hidden).all():
                raise BlockLostError(
                    f"block {index}: the output for sample {sample.index} is not finite in {hidden.dtype}; "
                    "try --dtype float32"
                )

    def parking(self, tier: str) -> Parking | None:
        """Return where tensors of a tier are parked; None where they stay on the device."""
        if tier == "device":
            return None
        return MemoryParking() if tier == "ram" else self._disk_parking

    @cached_property
    def _disk_parking(self) -> DiskParking:
        return DiskParking(self.setup.scratch)

    def peak_vram_bytes(self) -> int:
        """Return the most memory that torch has held on this worker's GPU; 0 on a CPU."""
        return torch.cuda.max_memory_reserved(self.device) if self.device.type == "cuda" else 0

    def scratch_bytes(self) -> int:
        """Return the most that there has been in the scratch file."""
        return self._disk_parking.peak_bytes if "_disk_parking" in self.__dict__ else 0

    def _count_moved(self, size_bytes: int) -> None:
        self.moved_bytes += size_bytes

    def _embedding_rows(self, tokens: Tensor) -> Tensor:
        """Read the embedding rows of ``tokens`` [U] (ascending), [U, H]: runs of consecutive rows in one read."""
        entry, ids = self._stem.embedding, tokens.tolist()
        runs: list[list[int]] = []
        for token in ids:
            if runs and token == runs[-1][1]:
                runs[-1][1] += 1
            else:
                runs.append([token, token + 1])
        rows = torch.cat([read_rows(entry, start, stop) for start, stop in runs])
        check_finite(entry, rows)
        return rows.to(self.device, self.skeleton.dtype)
