"""What a run has done so far, as its journal tells it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from billhook.layerworkers.errors import DamagedRunError, OptionError, OtherPlanError
from billhook.layerworkers.methods import COLLECT
from billhook.layerworkers.tasks import LinearReport
from billhook.orchestrator.journal import Line, read_journal

SOLVE_KEYS = frozenset(
    {
        "method",
        "methods",
        "sparsity",
        "pattern",
        "allocation",
        "allocation_options",
        "options",
        "fit",
        "correction",
        "reconstruct",
        "reconstruct_rate",
        "route",
        "expert_tokens",
        "expert_fallback",
        "include",
        "exclude",
    }
)
"""Keys of a recipe that decide how a block is pruned, but not what goes into it."""


@dataclass(frozen=True)
class Decided:
    """A plan line or a branch line: by what the blocks from ``first_block`` on are pruned."""

    first_block: int
    is_branch: bool
    fingerprint: dict[str, Any]
    source: str
    """Folder of the source."""
    asked: dict[str, Any]
    """What was asked for: ``model``, ``recipe`` and ``resources``."""


@dataclass(frozen=True)
class History:
    """A journal, read to its end: what still holds."""

    decided: tuple[Decided, ...]
    """The plan and the branches since, by ``first_block``; empty for a run that has not begun."""
    blocks: tuple[Line, ...]
    """The lines of the committed blocks, from block 0 on without a gap."""
    kept_inputs: int | None
    """The last block whose inputs were kept, and would still be the same."""
    rest_copied: bool
    done: Line | None
    """The last line, where the run is finished."""


def read_history(output: Path) -> History:
    """Read the journal of an output; a folder without one has an empty history."""
    return history_of(read_journal(output))


def history_of(lines: Sequence[Line]) -> History:
    """Put the lines of a journal together."""
    decided: list[Decided] = []
    blocks: list[Line] = []
    kept: int | None = None
    rest, done = False, None
    for line in lines:
        if line["kind"] in ("plan", "branch"):
            first = line.get("from_block", 0)
            new = Decided(first, line["kind"] == "branch", line["fingerprint"], line["source"], line["asked"])
            if kept is not None and (kept > first or not _same_inputs(decided[-1].fingerprint, new.fingerprint)):
                kept = None
            decided = [earlier for earlier in decided if earlier.first_block < first] + [new]
            del blocks[first:]
            done = None
        elif line["kind"] == "block":
            if line["index"] != len(blocks):
                raise DamagedRunError(
                    f"the journal commits block {line['index']} after {len(blocks)} blocks: it was damaged, or two "
                    "commands wrote it; remove the output and begin again"
                )
            blocks.append(line)
            kept = line["index"] + 1 if line["kept_inputs"] else kept
        elif line["kind"] == "rest":
            rest = True
        elif line["kind"] == "done":
            done = line
    return History(tuple(decided), tuple(blocks), kept, rest, done)


def is_collection(history: History) -> bool:
    """Whether it is of statistics that are collected, rather than of a checkpoint."""
    return bool(history.decided) and history.decided[-1].fingerprint["recipe"]["method"] == COLLECT.name


def linear_report(linear: Mapping[str, Any]) -> LinearReport:
    """Return how a linear came out, as a block's line has it."""
    return LinearReport(**{**linear, "shape": tuple(linear["shape"]), "dampings": tuple(linear["dampings"])})


def reports_of(history: History) -> tuple[LinearReport, ...]:
    """Return how all linears of the committed blocks came out."""
    return tuple(linear_report(linear) for block in history.blocks for linear in block["linears"])


def branch_point(
    history: History, fingerprint: dict[str, Any], from_block: int | None, force: bool, name: str
) -> int | None:
    """Return the block from which ``fingerprint`` holds instead of what held so far; None where nothing changes.

    from_block, force: as asked for on the command line. name: of the output, for messages.

    Raises:
        InputError: when the output holds a run that this one cannot go on with: the keys that differ are named.
    """
    if not history.decided:
        if from_block is not None:
            raise OptionError(f"--from-block {from_block}: {name} holds no run yet; leave it out")
        return None
    current = history.decided[-1]
    differing = _differences(current.fingerprint, json.loads(json.dumps(fingerprint)))
    hard = [key for key, _, _ in differing if not key.startswith(("versions", "machine"))]
    if from_block is not None and not hard and current.is_branch and current.first_block == from_block:
        from_block = None  # the same command again
    if from_block is None and not hard and history.done is not None:
        return None
    told = "; ".join(f"{key}: {old!r} there, {new!r} asked for" for key, old, new in differing[:6])
    if any(key.startswith("checkpoint") for key in hard):
        raise OtherPlanError(
            f"{name}: holds a run of another source checkpoint, or it was changed since; {told}. Choose another folder"
        )
    if from_block is None and hard:
        raise OtherPlanError(
            f"{name}: holds a run with another plan; it differs in {told}. Give the same options to go on with it, "
            "choose another folder, or redo the blocks from K on with these options: --from-block K"
        )
    if not force and len(hard) < len(differing):
        raise OtherPlanError(
            f"{name}: was begun with other libraries or on another kind of machine; it differs in {told}. Go on where "
            "it was begun, or with --force: the checkpoint will then be as good, but not byte for byte the one that an "
            "uninterrupted run writes"
        )
    if from_block is None:
        return len(history.blocks) if differing else None
    if not 0 <= from_block <= len(history.blocks):
        done = f"blocks 0 to {len(history.blocks) - 1}" if history.blocks else "no block"
        raise OptionError(f"--from-block {from_block}: {name} has {done} done; give at most {len(history.blocks)}")
    return from_block


def check_beforehand(
    history: History, fingerprint: dict[str, Any], from_block: int | None, force: bool, name: str
) -> None:
    """Check what :func:`branch_point` checks, before it is known what each linear loses.

    That is taken to be what the same allocator found for the run that is there.

    Raises:
        InputError: as :func:`branch_point`.
    """
    recipe = dict(fingerprint["recipe"])
    if history.decided:
        recorded = str(history.decided[-1].fingerprint["recipe"]["allocation"])
        if recorded.partition(" ")[0] == recipe["allocation"]:
            recipe["allocation"] = recorded
    branch_point(history, {**fingerprint, "recipe": recipe}, from_block, force, name)


def _same_inputs(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether blocks that both plans have pruned alike hand on the same hidden states."""

    def without_solving(fingerprint: dict[str, Any]) -> dict[str, Any]:
        recipe = {key: value for key, value in fingerprint["recipe"].items() if key not in SOLVE_KEYS}
        return {**fingerprint, "recipe": recipe}

    return without_solving(one) == without_solving(other)


def _differences(old: Any, new: Any, name: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(key for key in new if key not in old)]
        return [
            found
            for key in keys
            for found in _differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
        ]
    return [] if old == new else [(name, old, new)]
