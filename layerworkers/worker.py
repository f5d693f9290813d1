"""One worker: it holds the skeleton, its calibration samples' hidden states, and one block at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from billhook.layerworkers.collective import Collective
from billhook.layerworkers.errors import InputError, RunError
from billhook.layerworkers.lockstep import run_lockstep, run_plain
from billhook.layerworkers.shards import (
    FLOAT_DTYPES,
    TensorEntry,
    read_rows,
    read_tensor,
    sync_file,
    write_bytes,
)
from billhook.layerworkers.skeleton import Arguments, Skeleton, same_arguments
from billhook.layerworkers.solving import Solved, solve_group
from billhook.layerworkers.tasks import (
    BlockReport,
    BlockTask,
    ModuleTensor,
    Sample,
    StemTask,
    WindowLoss,
    WorkerSetup,
)

HEAD_SLICE_BYTES = 64 << 20
"""Bytes of the head matrix that are held at once."""


class BlockWorker:
    """Runs blocks of one model over its share of the samples, in step with the other workers of ``group``."""

    def __init__(self, setup: WorkerSetup, group: Collective):
        self._group = group
        self._device = torch.device(setup.device)
        if self._device.type == "cpu":
            torch.set_num_threads(setup.threads)
        else:
            torch.backends.cuda.matmul.allow_tf32 = False
        self._skeleton = Skeleton(
            Path(setup.folder), getattr(torch, setup.dtype), self._device, setup.trust_remote_code
        )
        self._samples: list[Sample] = []
        self._hidden: list[Tensor] = []
        self._arguments: list[Arguments] | None = None

    def start(self, task: StemTask, samples: Sequence[Sample]) -> None:
        """Embed this worker's samples (consecutive, in order, all of one length) and learn the blocks' arguments.

        Raises:
            InputError: when a tensor holds NaN, or a block's arguments depend on the tokens.
        """
        self._stem = task
        for tensor in task.tensors:
            self._skeleton.set_parameter(tensor.module_name, _read_finite(tensor.entry))
        self._samples, self._hidden, self._arguments = list(samples), [], None
        for sample in self._samples:
            tokens = torch.tensor(sample.tokens, dtype=torch.int64)
            hidden, arguments = self._skeleton.begin(tokens, self._embedding_rows)
            self._hidden.append(hidden)
            if self._arguments is None:
                self._arguments = arguments
            elif not same_arguments(self._arguments, arguments):
                raise InputError(
                    f"{type(self._skeleton.model).__name__}: the blocks' arguments depend on the tokens; "
                    "this architecture is not supported yet"
                )

    def prune_block(self, task: BlockTask) -> BlockReport:
        """Prune one block, write this worker's share of its tensors, and carry the samples through it.

        Fitted in ``lockstep``, a linear sees inputs that passed the sparse linears before it, in one forward pass.
        Fitted to the ``dense-block``, it sees what the dense block gives it, and a second pass carries the samples on.

        Raises:
            InputError: when a weight is NaN or infinite: the tensor is named.
            RunError: when a solve or the disk fails.
        """
        disk = self._load(task.tensors)
        linears = {linear.name: linear for linear in task.linears}
        groups = [
            tuple(name for name in group if name in linears) for group in self._skeleton.facts(task.index).input_groups
        ]
        block = self._skeleton.blocks[task.index]
        entries = {tensor.entry.name: tensor for tensor in task.tensors}
        solved: dict[str, Solved] = {}

        @torch.inference_mode()
        def on_group(group: tuple[str, ...], inputs: list[Tensor]) -> None:
            tasks = [linears[name] for name in group]
            for result in solve_group(
                tasks,
                {linear.disk_name: disk[linear.disk_name] for linear in tasks},
                [(sample.index, x) for sample, x in zip(self._samples, inputs, strict=True)],
                task,
                self._group,
                self._device,
            ):
                name = result.report.name
                solved[name], disk[name] = result, result.weight
                if task.fit == "lockstep":
                    self._skeleton.set_parameter(entries[name].module_name, result.weight)

        arguments = self._arguments_of(task.index)
        through = self._hidden if task.fit == "lockstep" else list(self._hidden)
        run_lockstep(block, [group for group in groups if group], through, arguments, on_group)
        if task.fit == "dense-block":
            for name, result in solved.items():
                self._skeleton.set_parameter(entries[name].module_name, result.weight)
            run_plain(block, self._hidden, arguments)
        self._check_hidden(task.index)
        self._write(task, disk)
        self._skeleton.drop_block(task.index)
        return BlockReport(task.index, tuple(solved[linear.disk_name].report for linear in task.linears))

    def forward_block(self, index: int, tensors: Sequence[ModuleTensor]) -> None:
        """Carry the samples through block ``index`` as it is on disk."""
        self._load(tensors)
        run_plain(self._skeleton.blocks[index], self._hidden, self._arguments_of(index))
        self._check_hidden(index)
        self._skeleton.drop_block(index)

    def logits(self, index: int) -> Tensor:
        """Return the logits [1, T, V] of this worker's ``index``-th sample, whose hidden state left the last block."""
        return self._skeleton.finish(self._hidden[index], self._apply_head)

    def losses(self) -> list[WindowLoss]:
        """Return the mean next-token cross-entropy of each of this worker's samples."""
        results = []
        for number, sample in enumerate(self._samples):
            logits = self.logits(number)[0, :-1]
            targets = torch.tensor(sample.tokens[1:], device=self._device)
            if not torch.isfinite(logits).all():
                raise RunError(
                    f"the logits of window {sample.index} are not finite in {logits.dtype}; try --dtype float32"
                )
            total = math.fsum(
                float(functional.cross_entropy(part.float(), wanted, reduction="sum"))
                for part, wanted in zip(torch.split(logits, 128), torch.split(targets, 128), strict=True)
            )
            results.append(WindowLoss(sample.index, total / len(targets), len(targets)))
        return results

    def peak_vram_bytes(self) -> int:
        """Return the most memory that torch has held on this worker's GPU; 0 on a CPU."""
        return torch.cuda.max_memory_reserved(self._device) if self._device.type == "cuda" else 0

    def _load(self, tensors: Sequence[ModuleTensor]) -> dict[str, Tensor]:
        """Read the block's tensors into the module; return them as on disk, by name."""
        disk: dict[str, Tensor] = {}
        for tensor in tensors:
            disk[tensor.entry.name] = _read_finite(tensor.entry)
            self._skeleton.set_parameter(tensor.module_name, disk[tensor.entry.name])
        return disk

    def _write(self, task: BlockTask, disk: dict[str, Tensor]) -> None:
        """Write every ``size``-th tensor of the block, so that the workers share the work, and sync the shards."""
        own = [*(tensor.entry for tensor in task.tensors), *task.others][self._group.rank :: self._group.size]
        shards = set()
        for entry in own:
            path = f"{task.output}/{Path(entry.path).name}.part"
            data = disk[entry.name] if entry.name in disk else read_tensor(entry)
            write_bytes(path, entry.start_bytes, data)
            shards.add(path)
        for path in sorted(shards):
            sync_file(path)

    def _check_hidden(self, index: int) -> None:
        for sample, hidden in zip(self._samples, self._hidden, strict=True):
            if not torch.isfinite(hidden).all():
                raise RunError(
                    f"block {index}: the output for sample {sample.index} is not finite in {hidden.dtype}; "
                    "try --dtype float32"
                )

    def _arguments_of(self, index: int) -> Arguments | None:
        return None if self._arguments is None else self._arguments[index]

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
        if not torch.isfinite(rows).all():
            raise InputError(f"{entry.path}: tensor {entry.name} holds NaN or infinity; mend the source checkpoint")
        return rows.to(self._device, self._skeleton.dtype)

    def _apply_head(self, hidden: Tensor) -> Tensor:
        """Multiply by the head matrix [V, H], read in slices of rows."""
        entry = self._stem.head
        rows = max(256, HEAD_SLICE_BYTES // (entry.size_bytes // entry.shape[0]))
        logits = hidden.new_empty(*hidden.shape[:-1], entry.shape[0])
        for start in range(0, entry.shape[0], rows):
            stop = min(start + rows, entry.shape[0])
            rows_read = read_rows(entry, start, stop)
            if not torch.isfinite(rows_read).all():
                raise InputError(f"{entry.path}: tensor {entry.name} holds NaN or infinity; mend the source checkpoint")
            weight = rows_read.to(self._device, hidden.dtype)
            logits[..., start:stop] = functional.linear(hidden, weight)
        return logits


def _read_finite(entry: TensorEntry) -> Tensor:
    tensor = read_tensor(entry)
    if entry.dtype in FLOAT_DTYPES and not torch.isfinite(tensor).all():
        raise InputError(f"{entry.path}: tensor {entry.name} holds NaN or infinity; mend the source checkpoint")
    return tensor
