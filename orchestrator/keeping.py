"""Inputs of a block that are kept on disk, so that a resumed run need not carry its samples there again."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

from billhook.layerworkers.descriptors import disk_failure
from billhook.layerworkers.errors import InputError
from billhook.layerworkers.files import sync_file
from billhook.layerworkers.shards import TensorEntry, read_header
from billhook.orchestrator.journal import FOLDER

ACTIVATIONS = "activations"
"""Folder within the private one."""

MAX_SHARE = 0.02
"""Most of a run's time that keeping may take."""


def keep_every(blocks: int, block_seconds: float, keep_seconds: float, replay_seconds: float) -> int:
    """Return after how many blocks the inputs of the next are kept; 0: never.

    block_seconds: to prune a block. keep_seconds: to write the inputs once. replay_seconds: to carry them through a
    block. With one interruption to be expected, keeping every k blocks costs ``blocks / k * keep_seconds`` for writing
    and on average ``k / 2 * replay_seconds`` for replaying; this is least at Young's interval (A first order
    approximation to the optimum checkpoint interval, 1974). Kept is less often where that would take too long.
    """
    young = math.sqrt(2 * blocks * keep_seconds / replay_seconds) if replay_seconds > 0 else math.inf
    affordable = keep_seconds / (MAX_SHARE * block_seconds) if block_seconds > 0 else math.inf
    every = max(young, affordable, 1.0)
    return math.ceil(every) if every < blocks else 0


def kept_copies(every: int) -> int:
    """Return how many blocks' inputs lie on the disk at once where those of each ``every``-th are kept; 0: of none.

    The last ones stay until a block behind them is committed, and by then the next block is under way.
    """
    return {0: 0, 1: 3}.get(every, 2)


def create_kept(output: Path, block: int, rows: int, row_bytes: int) -> TensorEntry:
    """Create the file for the inputs of ``block``, of its final size; row i holds the bytes of sample i's.

    Those of a dense stream, where there is one, are as many rows below.

    Raises:
        RunError: when the disk is full or fails.
    """
    shape = (rows, row_bytes)
    body = json.dumps({"inputs": {"dtype": "U8", "shape": shape, "data_offsets": [0, rows * row_bytes]}})
    raw = body.encode().ljust(-(-len(body) // 8) * 8)
    path = _path(output, block)
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        with path.open("wb") as file:
            file.write(len(raw).to_bytes(8, "little") + raw)
            file.truncate(8 + len(raw) + rows * row_bytes)
        sync_file(str(path))
        sync_file(str(path.parent))
    except OSError as error:
        raise disk_failure(str(path), "writing", error) from error
    begin = 8 + len(raw)
    return TensorEntry("inputs", str(path), "U8", shape, begin, begin + rows * row_bytes)


def find_kept(output: Path, block: int, rows: int, row_bytes: int) -> TensorEntry | None:
    """Return the kept inputs of ``block``; None where they are gone or of another size."""
    try:
        _, entries = read_header(_path(output, block))
    except (OSError, InputError):
        return None
    return entries[0] if [entry.shape for entry in entries] == [(rows, row_bytes)] else None


def kept_size_bytes(output: Path) -> int:
    """Return the size of all kept inputs."""
    return sum(path.stat().st_size for path in (output / FOLDER / ACTIVATIONS).glob("*.safetensors"))


def remove_kept(output: Path, before: int | None = None) -> None:
    """Remove kept inputs: those of the blocks before ``before``, which leaves what is being written; or all."""
    folder = output / FOLDER / ACTIVATIONS
    if before is None:
        shutil.rmtree(folder, ignore_errors=True)
        return
    for path in folder.glob("*.safetensors"):
        if path.name < _path(output, before).name:
            path.unlink(missing_ok=True)


def _path(output: Path, block: int) -> Path:
    return output / FOLDER / ACTIVATIONS / f"inputs-{block:05d}.safetensors"
