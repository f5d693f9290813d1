"""Ways to spoil a finished output, and to make its hashes agree with it again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from billhook.orchestrator.journal import append, journal_path, read_journal
from billhook.orchestrator.output import hashes_of, sha256_of


def forge_hashes(out: Path) -> None:
    """Make manifest and journal agree with the files as they are now: only the content gives a change away."""
    manifest_path = out / "billhook" / "manifest.json"
    manifest = json.loads(manifest_path.read_text())
    manifest["files"] = hashes_of([path for path in out.iterdir() if path.is_file()])
    manifest_path.write_text(json.dumps(manifest))
    lines = read_journal(out)
    journal_path(out).unlink()
    lines[-1]["manifest"] = sha256_of(manifest_path)
    for line in lines:
        append(out, line.pop("kind"), line)


def read_shard(path: Path) -> tuple[dict[str, Any], bytearray]:
    """Return a shard's header and data."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), bytearray(raw[8 + length :])


def write_shard(path: Path, header: dict[str, Any], data: bytearray) -> None:
    """Write a shard, with its header padded as safetensors does."""
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
