"""The journal of a run: one checksummed JSON line for each thing that is done for good."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from billhook.layerworkers.descriptors import disk_failure
from billhook.layerworkers.errors import DamagedRunError
from billhook.layerworkers.files import sync_file

FOLDER = "billhook"
"""Folder within the output that holds everything that is not the checkpoint."""

Line = dict[str, Any]


def journal_path(output: Path) -> Path:
    """Return where an output's journal lies."""
    return output / FOLDER / "journal.jsonl"


def read_journal(output: Path) -> list[Line]:
    """Return the committed lines: those before the first that is torn or fails its checksum.

    Raises:
        InputError: when good lines follow a bad one: no crash leaves that, the file was damaged.
    """
    try:
        raw = journal_path(output).read_bytes()
    except FileNotFoundError:
        return []
    lines: list[Line] = []
    whole = raw.split(b"\n")[:-1]
    for number, text in enumerate(whole):
        line = _checked(text)
        if line is None:
            if any(_checked(later) is not None for later in whole[number + 1 :]):
                raise DamagedRunError(
                    f"{journal_path(output)}: line {number + 1} is damaged, later ones are not; restore the file from "
                    f"a copy, or remove {output} and begin again"
                )
            break
        lines.append(line)
    return lines


def has_loose_end(output: Path) -> bool:
    """Whether anything follows the committed lines, such as a line that was torn when the machine died."""
    return journal_path(output).read_bytes() != b"".join(map(_encode, read_journal(output)))


def append(output: Path, kind: str, content: Mapping[str, Any]) -> None:
    """Append one line, with the time, and wait until it is on the disk: from then on it holds.

    Whatever lies after the last good line, such as a torn one, is cut off first.

    Raises:
        RunError: when the disk is full or fails.
    """
    path = journal_path(output)
    good = sum(len(_encode(line)) for line in read_journal(output))
    data = _encode({"kind": kind, "time": round(time.time(), 3), **content})
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            os.ftruncate(descriptor, good)
            done = 0
            while done < len(data):
                done += os.pwrite(descriptor, data[done:], good + done)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        sync_file(str(path.parent))
    except OSError as error:
        raise disk_failure(str(path), "writing", error) from error


def _encode(line: Line) -> bytes:
    body = json.dumps(line, sort_keys=True, separators=(",", ":"))
    check = hashlib.sha256(body.encode()).hexdigest()[:16]
    return f'{body[:-1]},"check":"{check}"}}\n'.encode()


def _checked(text: bytes) -> Line | None:
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict) or line.pop("check", None) is None:
        return None
    return line if _encode(line) == text + b"\n" else None
