"""Re-read a finished checkpoint and check every promise that can be checked."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from billhook.layerworkers.errors import InputError, NoRunError, OptionError, RunError
from billhook.layerworkers.files import read_bytes
from billhook.layerworkers.patterns import NM, exact_fraction, parse_pattern
from billhook.layerworkers.shards import TensorEntry
from billhook.layerworkers.solving import DENSE
from billhook.orchestrator.allocation import UNIFORM
from billhook.orchestrator.checkpoint import Checkpoint, Shard, open_checkpoint, open_file, resolve_model
from billhook.orchestrator.events import Progress
from billhook.orchestrator.history import Decided, History, is_collection, read_history
from billhook.orchestrator.inspection import most_kept, pieces
from billhook.orchestrator.journal import FOLDER, has_loose_end, journal_path
from billhook.orchestrator.logits import LogitsCheck, check_logits, prompts_of
from billhook.orchestrator.output import CARD, COPY_BYTES, MANIFEST, hashes_of, is_ours, read_manifest, sha256_of
from billhook.orchestrator.paths import user_path
from billhook.orchestrator.promised_rows import broken_promise, promised_rows


@dataclass(frozen=True)
class Problem:
    """One broken promise."""

    name: str
    """File or tensor."""
    reason: str


@dataclass(frozen=True)
class Verification:
    """What a verification found."""

    ok: bool
    problems: tuple[Problem, ...]
    checked_tensors: int
    against: str | None
    """The source that the checkpoint was compared with; None where it was not found."""
    logits: LogitsCheck | None = None
    """Where they were asked for, and no other problem was found."""


def verify(
    output: str | Path,
    *,
    against: str | Path | None = None,
    logits: bool = False,
    text: str | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Check a finished checkpoint; ``against`` is its source, by default the one that it was made from, if
    it is still there and the same.

    Of statistics that were collected, only the records and the hashes are checked. Of a checkpoint, checked are: the
    journal line by line, the manifest against it, the hash of every file; of each pruned tensor the
    count of zeros against the pattern, also of each row where an allocation said what each loses and its table is
    still there, the N:M pattern, no NaN, no infinity, no negative zero; against the source the
    files, names, dtypes, shapes, shard layout, and byte identity of every tensor that was not pruned. What is timed
    (``events.jsonl`` and whatever else lies in the private folder) is not part of it.

    logits: when all of that holds, also pass a few prompts through the checkpoint, streamed and in transformers, which
    must agree, and through the source; see :func:`billhook.orchestrator.logits.check_logits`. text: what the prompts
    are taken from, by default what the run was calibrated on.

    Raises:
        InputError: when ``output`` holds no finished run, its journal is damaged, ``against`` is no checkpoint, or
            ``text`` is missing or too short.
        RunError: a worker failed.
    """
    folder = user_path(output)
    if not folder.is_dir() or not is_ours(folder):
        raise NoRunError(f"{output}: no billhook run in this folder; 'billhook inspect' reads any checkpoint")
    history = read_history(folder)
    if history.done is None:
        raise NoRunError(f"{output}: the run is not finished; run the same 'billhook prune' command again")
    recipe = history.decided[-1].asked["recipe"]
    collected = is_collection(history)
    if collected and logits:
        raise OptionError(f"--logits: {output} holds collected statistics, and no model")
    prompts = prompts_of(recipe, text) if logits else None
    source = _source(against, history.decided[-1])
    problems: list[Problem] = []
    checked = 0
    try:
        manifest = read_manifest(folder)
        problems += _check_record(folder, history, manifest)
        problems += _check_files(folder, manifest)
        if collected:
            checked = sum(len(open_file(path).entries) for path in folder.glob("*.safetensors"))
        else:
            checkpoint = open_checkpoint(folder)
            checked = len(checkpoint.tensors)
            problems += _check_checkpoint(checkpoint, source, manifest["linears"])
            problems += _check_rows(checkpoint, manifest["linears"], promised_rows(folder, history))
    except (InputError, RunError) as error:
        problems.append(Problem(str(folder), str(error)))
    except OSError as error:
        problems.append(Problem(str(error.filename or folder), error.strerror or str(error)))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        problems.append(Problem(f"{FOLDER}/{MANIFEST}", f"is malformed: {error!r}"))
    compared = None
    if prompts is not None and not problems:
        reference = source.folder if source else None
        compared = check_logits(folder, reference, prompts, recipe["trust_remote_code"], progress)
        if not compared.ok:
            reason = (
                f"streamed and in transformers they differ by {compared.difference_nats:.4f} nats per token, "
                f"{compared.tolerance_nats} are allowed"
            )
            problems.append(Problem("logits", reason))
    return Verification(not problems, tuple(problems), checked, str(source.folder) if source else None, compared)


def _check_checkpoint(
    checkpoint: Checkpoint, source: Checkpoint | None, linears: Sequence[dict[str, Any]]
) -> Iterator[Problem]:
    for linear in linears:
        yield from _check_linear(checkpoint, linear)
    if source is not None:
        pruned = {linear["name"] for linear in linears if linear["pattern"] != DENSE}
        yield from _check_against(checkpoint, source, pruned)


def _source(against: str | Path | None, decided: Decided) -> Checkpoint | None:
    if against is not None:
        return open_checkpoint(resolve_model(against))
    try:
        source = open_checkpoint(Path(decided.source))
    except InputError:
        return None
    return source if source.source().sha256 == decided.fingerprint["checkpoint"] else None


def _check_record(folder: Path, history: History, manifest: dict[str, Any]) -> Iterator[Problem]:
    """Compare journal and manifest, and what they say was removed with what was asked for."""
    name = f"{FOLDER}/{MANIFEST}"
    if has_loose_end(folder):
        yield Problem(f"{FOLDER}/{journal_path(folder).name}", "something follows its last line")
    assert history.done is not None
    if sha256_of(folder / FOLDER / MANIFEST) != history.done["manifest"]:
        yield Problem(name, "differs from what the journal committed")
    *earlier, current = history.decided
    recorded = {
        **current.fingerprint,
        "from_block": current.first_block,
        "earlier": [{"from_block": each.first_block, **each.fingerprint} for each in earlier],
        "linears": [linear for block in history.blocks for linear in block["linears"]],
    }
    for key, value in recorded.items():
        if manifest.get(key) != value:
            yield Problem(name, f"its {key!r} differs from the journal's")
    for block in history.blocks:
        decided = [each for each in history.decided if each.first_block <= block["index"]][-1]
        for linear in block["linears"]:
            yield from _check_count(linear, decided.fingerprint["recipe"])


def _check_count(linear: dict[str, Any], recipe: dict[str, Any]) -> Iterator[Problem]:
    """Compare the entries that were removed of a linear with its pattern."""
    if linear["pattern"] == DENSE:
        return
    rows, columns = linear["shape"]
    pattern = parse_pattern(linear["pattern"], None)
    if pattern != parse_pattern(recipe["pattern"], None):
        yield Problem(linear["name"], f"has the pattern {pattern}, {recipe['pattern']} was asked for")
    if isinstance(pattern, NM):
        if linear["removed"] != pattern.sparsity * rows * columns:
            yield Problem(linear["name"], f"lost {linear['removed']} of {rows * columns} weights, pattern {pattern}")
    elif recipe["allocation"] == UNIFORM:
        # A method compares all entries, those of a row, or those of some columns: of each such part it removes the
        # whole number below the share that was asked for.
        wanted = exact_fraction(recipe["sparsity"]) * rows * columns
        if not 0 <= wanted - linear["removed"] < max(rows, columns):
            yield Problem(
                linear["name"],
                f"lost {linear['removed']} of {rows * columns} weights, {float(wanted):.0f} were asked for",
            )


def _check_files(folder: Path, manifest: dict[str, Any]) -> Iterator[Problem]:
    recorded = manifest["files"]
    present = {path.name for path in folder.iterdir() if path.name != FOLDER}
    for name in sorted(present - set(recorded)):
        yield Problem(name, "is not in the manifest")
    for name in sorted(set(recorded) - present):
        yield Problem(name, "is missing")
    found = hashes_of([folder / name for name in sorted(present & set(recorded))])
    for name, sha256 in found.items():
        if sha256 != recorded[name]:
            yield Problem(name, "its sha256 differs from the manifest's")


def _check_linear(checkpoint: Checkpoint, linear: dict[str, Any]) -> Iterator[Problem]:
    name = linear["name"]
    entry = _entry(checkpoint, name)
    if entry is None:
        yield Problem(name, "was pruned according to the manifest, but is not in the checkpoint")
        return
    if not entry.size_bytes:
        yield Problem(name, "is empty")
        return
    pattern = None if linear["pattern"] == DENSE else parse_pattern(linear["pattern"], None)
    if (pattern is None) != (linear["fallback"] == "dense"):
        yield Problem(name, f"has the pattern {linear['pattern']}, and {linear['fallback'] or 'nothing'} instead of it")
    zeros, kept, bad, negative_zeros = 0, 0, 0, 0
    # Along the inputs, which are the rows of what is stored as its transpose.
    multiple = pattern.group if linear["transposed"] and isinstance(pattern, NM) else 1
    for piece in pieces(entry, multiple):
        is_zero = piece == 0
        zeros += int(is_zero.sum())
        negative_zeros += int((is_zero & torch.signbit(piece)).sum())
        bad += int((~torch.isfinite(piece)).sum())
        if isinstance(pattern, NM):
            kept = max(kept, most_kept(is_zero.logical_not().t() if linear["transposed"] else ~is_zero, pattern.group))
    if bad:
        yield Problem(name, f"holds {bad} NaN or infinite values")
    if negative_zeros and linear["removed"]:
        yield Problem(name, f"holds {negative_zeros} negative zeros")
    if zeros != linear["zeros"]:
        yield Problem(name, f"holds {zeros} zeros, the manifest says {linear['zeros']}")
    if zeros < linear["removed"]:
        yield Problem(name, f"holds {zeros} zeros, {linear['removed']} were to be removed")
    if isinstance(pattern, NM) and kept > pattern.keep:
        yield Problem(name, f"keeps {kept} of {pattern.group} consecutive weights somewhere, pattern {pattern}")


def _check_rows(
    checkpoint: Checkpoint, linears: Sequence[dict[str, Any]], promised: Mapping[str, Sequence[int]]
) -> Iterator[Problem]:
    """Compare rows that were to lose numbers of their own with these."""
    for linear in linears:
        counts, entry = promised.get(linear["name"]), _entry(checkpoint, linear["name"])
        if counts is None or entry is None or linear["pattern"] == DENSE:
            continue
        if (reason := broken_promise(entry, linear["transposed"], linear["removed"], counts)) is not None:
            yield Problem(linear["name"], reason)


def _check_against(checkpoint: Checkpoint, source: Checkpoint, pruned: set[str]) -> Iterator[Problem]:
    own, theirs = ({shard.name: shard for shard in each.shards} for each in (checkpoint, source))
    for name in sorted(own.keys() ^ theirs.keys()):
        yield Problem(name, "is a shard of one of source and output only")
    for name in sorted(own.keys() & theirs.keys()):
        if own[name].header != theirs[name].header:
            yield Problem(name, "its header (names, dtypes, shapes, offsets) differs from the source's")
            yield from _differing_entries(own[name], theirs[name])
            continue
        for entry, original in zip(own[name].entries, theirs[name].entries, strict=True):
            for part, original_part in zip(_parts(entry, pruned), _parts(original, pruned), strict=True):
                if part.name not in pruned and not _same_bytes(part, original_part):
                    yield Problem(part.name, "was not pruned, but differs from the source")
    ours = {*own, *source.others, CARD, FOLDER}
    for path in sorted(checkpoint.folder.iterdir()):
        if path.name not in ours:
            yield Problem(path.name, "is not in the source")
    for name in source.others:
        if name != CARD and not (checkpoint.folder / name).is_file():
            yield Problem(name, "is in the source, but was not carried over")
        elif name != CARD and sha256_of(checkpoint.folder / name) != sha256_of(source.folder / name):
            yield Problem(name, "differs from the source")


def _differing_entries(own: Shard, theirs: Shard) -> Iterator[Problem]:
    found, expected = ({entry.name: entry for entry in shard.entries} for shard in (own, theirs))
    for name in sorted(found.keys() ^ expected.keys()):
        yield Problem(name, f"is in {own.name} of one of source and output only")
    for name in sorted(found.keys() & expected.keys()):
        for what in ("dtype", "shape", "start_bytes"):
            here, there = getattr(found[name], what), getattr(expected[name], what)
            if here != there:
                yield Problem(name, f"its {what} is {here}, the source's {there}")


def _entry(checkpoint: Checkpoint, name: str) -> TensorEntry | None:
    """Return the tensor of this name, or the item ``tensor[number]`` of one."""
    if name in checkpoint.tensors:
        return checkpoint.tensors[name]
    stacked = re.fullmatch(r"(.*)\[(\d+)\]", name)
    entry = checkpoint.tensors.get(stacked[1]) if stacked else None
    if stacked is None or entry is None or not entry.shape or int(stacked[2]) >= entry.shape[0]:
        return None
    return entry.item(int(stacked[2]))


def _parts(entry: TensorEntry, pruned: set[str]) -> list[TensorEntry]:
    """Return the tensor, or its items where some of these were pruned by themselves."""
    items = [entry.item(number) for number in range(entry.shape[0])] if len(entry.shape) == 3 else []
    return items if any(item.name in pruned for item in items) else [entry]


def _same_bytes(left: TensorEntry, right: TensorEntry) -> bool:
    if left.size_bytes != right.size_bytes:
        return False
    for start in range(0, left.size_bytes, COPY_BYTES):
        size = min(COPY_BYTES, left.size_bytes - start)
        if not torch.equal(
            read_bytes(left.path, left.start_bytes + start, size),
            read_bytes(right.path, right.start_bytes + start, size),
        ):
            return False
    return True
