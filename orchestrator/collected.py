"""A folder of collected statistics: what is in it, and whether a request can be solved on it.

Each block has a safetensors file, with a flat float32 tensor for each input of linears; see
:mod:`billhook.layerworkers.collected`. Beside these lie a card and, in the private folder, journal and manifest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from billhook.layerworkers.collected import collected_floats
from billhook.layerworkers.errors import DamagedRunError, NoRunError, OptionError
from billhook.layerworkers.methods import Solver, method_named
from billhook.layerworkers.shards import TensorEntry
from billhook.orchestrator.checkpoint import Checkpoint, Shard, float_shard, open_file
from billhook.orchestrator.history import Decided, is_collection, read_history
from billhook.orchestrator.journal import FOLDER
from billhook.orchestrator.layout import Block, Linear
from billhook.orchestrator.model import Model
from billhook.orchestrator.output import MANIFEST, read_manifest, sha256_of
from billhook.orchestrator.paths import user_path


@dataclass(frozen=True)
class Collected:
    """Statistics on disk that linears are solved on."""

    sha256: str
    """Of the manifest, which has those of all files."""
    entries: tuple[Mapping[str, TensorEntry], ...]
    """By block, and in it by the first of the linears that share an input."""
    fallbacks: Mapping[str, str]
    """What becomes of linears of experts that had too few tokens for statistics, by their names on disk."""
    calibration: str
    """What the samples were, for a person."""


def statistics_files(model: Model, chosen: Sequence[Sequence[Linear]]) -> Checkpoint:
    """Return the files that the statistics of the inputs of linears will lie in, given these by block."""
    folder = model.checkpoint.folder
    return Checkpoint(
        folder, tuple(_shard(folder, *each) for each in zip(model.layout.blocks, chosen, strict=True)), ()
    )


def written_to(files: Checkpoint, index: int, output: Path) -> dict[str, TensorEntry]:
    """Return where in an unfinished output the statistics of block ``index`` go, by the first linear of an input."""
    shard = files.shards[index]
    return {entry.name: replace(entry, path=f"{output}/{shard.name}.part") for entry in shard.entries}


def source_of(folder: str | Path) -> str:
    """Return the folder of the model whose statistics were collected.

    Raises:
        InputError: when there are none in the folder, or they are not finished.
    """
    return _decided(folder).source


def open_collected(folder: str, model: Model, chosen: Sequence[Sequence[Linear]]) -> Collected:
    """Find the statistics of the inputs of linears, given these by block.

    Raises:
        InputError: when the folder holds none, or they are unfinished, damaged, of another model, or without some of
            the linears.
    """
    source = _decided(folder).source
    path = user_path(folder)
    manifest = read_manifest(path)
    try:
        recipe, of_model = manifest["recipe"], manifest["checkpoint"]
        fallbacks = {each["name"]: each["fallback"] for each in manifest["linears"]}
        calibration = (
            f"{recipe['samples']} samples of {recipe['seqlen']} tokens, seed {recipe['seed']}, passed through the "
            f"dense model; tokens sha256 `{recipe['calibration']}`"
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise DamagedRunError(f"{path / FOLDER / MANIFEST}: is malformed: {error!r}") from error
    if of_model != model.checkpoint.source().sha256:
        raise OptionError(
            f"--collected {folder}: the statistics are those of another model ({source}), or of what it was before it "
            "was changed; collect again"
        )
    for linear in (linear for linears in chosen for linear in linears):
        if linear.disk_name not in fallbacks:
            raise OptionError(
                f"--collected {folder}: {linear.disk_name} was left out when the statistics were collected; --exclude "
                "it, or collect again"
            )
    entries = tuple(_entries(path, shard) for shard in statistics_files(model, chosen).shards)
    starved = {name: fallback for name, fallback in fallbacks.items() if fallback in ("magnitude", "dense")}
    return Collected(sha256_of(path / FOLDER / MANIFEST), entries, starved, calibration)


def as_collected(
    collected: Collected, chosen: tuple[tuple[Linear, ...], ...], skipped: tuple[Linear, ...]
) -> tuple[tuple[tuple[Linear, ...], ...], tuple[Linear, ...], dict[str, Solver]]:
    """Return what is pruned, what is left dense, and by what linears are solved of which nothing was collected.

    These are of experts that too few tokens were sent to.
    """
    magnitude = method_named("magnitude")
    by_magnitude = {
        name: Solver(magnitude, magnitude.options())
        for name, fallback in collected.fallbacks.items()
        if fallback == "magnitude"
    }
    dense = {name for name, fallback in collected.fallbacks.items() if fallback == "dense"}
    left = tuple(linear for linears in chosen for linear in linears if linear.disk_name in dense)
    pruned = tuple(tuple(linear for linear in linears if linear.disk_name not in dense) for linears in chosen)
    return pruned, (*skipped, *left), by_magnitude


def _decided(folder: str | Path) -> Decided:
    path = user_path(folder)
    history = read_history(path) if path.is_dir() else None
    if history is None or not is_collection(history):
        raise NoRunError(f"{folder}: holds no collected statistics; 'billhook collect MODEL -o {folder}' makes them")
    if history.done is None:
        raise NoRunError(f"{folder}: the statistics are not complete; run the same 'billhook collect' again")
    return history.decided[-1]


def _entries(path: Path, expected: Shard) -> dict[str, TensorEntry]:
    """Return where a block's statistics lie; only those that are expected.

    Raises:
        InputError: when the file is damaged, or lacks one.
    """
    shard = open_file(path / expected.name)
    found = {entry.name: entry for entry in shard.entries}
    for entry in expected.entries:
        if entry.name not in found or (found[entry.name].dtype, found[entry.name].shape) != (entry.dtype, entry.shape):
            raise DamagedRunError(
                f"{path / expected.name}: has no statistics of the input of {entry.name}; collect again"
            )
    return {entry.name: found[entry.name] for entry in expected.entries}


def _shard(folder: Path, block: Block, linears: Sequence[Linear]) -> Shard:
    """Return the file for the statistics of a block's inputs, those of ``linears``."""
    name = f"block-{block.index:05d}.safetensors"
    columns = {linear.group: linear.shape[1] for linear in linears}
    floats = {block.groups[number].linears[0]: collected_floats(columns[number]) for number in sorted(columns)}
    return float_shard(folder, name, "F32", {key: (count,) for key, count in floats.items()})
