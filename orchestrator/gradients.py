"""Where the gradients of the dense model's loss lie while a run needs them, and how large they are.

In a folder within the private one, with a safetensors file for each block: of each linear whose method asks, the root
mean square over samples of each weight's gradient.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

from billhook.layerworkers.descriptors import disk_failure
from billhook.layerworkers.files import sync_file
from billhook.layerworkers.methods import Solver
from billhook.layerworkers.shards import TensorEntry
from billhook.orchestrator.checkpoint import Checkpoint, float_shard
from billhook.orchestrator.journal import FOLDER
from billhook.orchestrator.layout import Linear
from billhook.orchestrator.output import create_shards
from billhook.orchestrator.request import Request

GRADIENTS = "gradients"
"""Folder within the private one."""

COMPLETE = "made-from"
"""File in it that is written last: what decides every byte of the others."""


def asking(request: Request, index: int) -> list[Linear]:
    """Return the linears of a block whose methods ask for the gradients of the model's loss."""
    return [each for each in request.linears[index] if request.solver_of(each).method.model_gradients is not None]


def gradient_samples(request: Request) -> int:
    """Return on how many samples, the first ones, they are taken; 0: on none."""
    solvers = [Solver(request.method, request.method.options(**request.options)), *request.others.values()]
    asked = [each.method.model_gradients(each.options) for each in solvers if each.method.model_gradients]
    return min(request.samples, max(asked, default=0))


def gradient_files(request: Request) -> Checkpoint:
    """Return the files that they lie in; there is one for each block, in order."""
    folder = request.model.checkpoint.folder
    # Gradients are no more exact than the dtype that is computed in; float16 would lose the small ones.
    dtype = "F32" if request.recipe.dtype == "float32" else "BF16"
    shards = [
        float_shard(folder, f"block-{index:05d}.safetensors", dtype, {each.disk_name: each.shape for each in own})
        for index, own in enumerate(asking(request, index) for index in range(len(request.linears)))
    ]
    return Checkpoint(folder, tuple(shards), ())


def gradients_of(request: Request, index: int, output: Path) -> dict[str, TensorEntry]:
    """Return where those of a block lie, by names of weights on disk; empty where no method asks for any."""
    if not asking(request, index):
        return {}
    shard = gradient_files(request).shards[index]
    path = f"{output}/{FOLDER}/{GRADIENTS}/{shard.name}.part"
    return {entry.name: replace(entry, path=path) for entry in shard.entries}


def are_complete(request: Request, calibration_sha256: str, output: Path) -> bool:
    """Whether those of an earlier command are there, and are the same."""
    path = output / FOLDER / GRADIENTS / COMPLETE
    return path.is_file() and path.read_text() == _made_from(request, calibration_sha256)


def create_gradients(request: Request, output: Path) -> None:
    """Create the files, of their final size, in place of any that are there.

    Raises:
        RunError: when the disk is full or fails.
    """
    remove_gradients(output)
    folder = output / FOLDER / GRADIENTS
    try:
        folder.mkdir(mode=0o700)
    except OSError as error:
        raise disk_failure(str(folder), "creating", error) from error
    create_shards(folder, gradient_files(request))


def complete_gradients(request: Request, calibration_sha256: str, output: Path) -> None:
    """Note that all of them are on the disk.

    Raises:
        RunError: when the disk fails.
    """
    path = output / FOLDER / GRADIENTS / COMPLETE
    try:
        path.write_text(_made_from(request, calibration_sha256))
        sync_file(str(path))
        sync_file(str(path.parent))
    except OSError as error:
        raise disk_failure(str(path), "writing", error) from error


def gradients_size_bytes(output: Path) -> int:
    """Return the size of all of them; 0 where there are none."""
    return sum(path.stat().st_size for path in (output / FOLDER / GRADIENTS).glob("*"))


def remove_gradients(output: Path) -> None:
    """Remove them, if there are any."""
    shutil.rmtree(output / FOLDER / GRADIENTS, ignore_errors=True)


def _made_from(request: Request, calibration_sha256: str) -> str:
    fingerprint = request.fingerprint(calibration_sha256)
    kept = ("dtype", "device", "threads", "partition_samples", "calibration")
    names = [[each.disk_name for each in asking(request, index)] for index in range(len(request.linears))]
    made_from = {
        **{key: fingerprint[key] for key in ("checkpoint", "versions", "machine")},
        **{key: fingerprint["recipe"][key] for key in kept},
        **{"samples": gradient_samples(request), "linears": names},
    }
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest() + "\n"
