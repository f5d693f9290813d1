"""The output folder: shards that grow in place, what is carried over, the manifest."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from billhook.layerworkers.access import OutputAccess
from billhook.layerworkers.descriptors import disk_failure
from billhook.layerworkers.errors import (
    DamagedRunError,
    NoRunError,
    NoWorkersError,
    OutputBusyError,
    OutputError,
    OutputGoneError,
)
from billhook.layerworkers.files import READ_THREADS, read_bytes, sync_file, write_bytes
from billhook.layerworkers.shards import TensorEntry
from billhook.orchestrator.checkpoint import Checkpoint
from billhook.orchestrator.journal import FOLDER, journal_path

COPY_BYTES = 16 << 20
"""Bytes that are held while a tensor is copied."""

MANIFEST = "manifest.json"
LOCK = "lock"
"""Held by the one command that writes here."""

WORKERS_LOCK = "workers.lock"
"""Held, shared, by every worker that may write here."""

LOCK_SECONDS = 2.0
"""How long to wait for a lock that ``billhook status`` may be looking at."""

ORPHANS_SECONDS = 30.0
"""How long to wait for the workers of a dead command to end."""

CARD = "README.md"


def is_ours(output: Path) -> bool:
    """Whether the folder holds a run of ours: finished, interrupted, or killed before its first line."""
    private = output / FOLDER
    try:
        return private.is_dir() and ((private / LOCK).is_file() or not any(private.iterdir()))
    except OSError as error:
        raise NoRunError(f"{output}: cannot be read: {error.strerror}; only its owner can") from error


def check_free(output: Path, checkpoint: Checkpoint) -> None:
    """Check that the output may be written to.

    Raises:
        InputError: when it is the source or inside it, a file, or a folder with somebody else's files.
    """
    source = checkpoint.folder.resolve()
    if output.resolve() == source or source in output.resolve().parents:
        raise OutputError(f"-o {output}: is the source model's folder or inside it; choose another folder")
    if FOLDER in checkpoint.others:
        raise OutputError(f"{source / FOLDER}: the output needs this name for a folder of its own; move the file away")
    if output.exists() and not output.is_dir():
        raise OutputError(f"-o {output}: is a file; choose a folder")
    if output.is_dir() and any(output.iterdir()) and not is_ours(output):
        raise OutputError(f"-o {output}: the folder is not empty and holds no billhook run; choose another or empty it")


@dataclass(frozen=True)
class Lock:
    """What the command holds that writes to an output."""

    path: Path
    descriptor: int

    @property
    def in_place(self) -> bool:
        """Whether the file is still where it was when it was locked."""
        try:
            return os.path.samestat(os.fstat(self.descriptor), self.path.stat())
        except FileNotFoundError:
            return False

    def check(self) -> None:
        """Raise unless the output is still the one that was locked.

        Raises:
            RunError: when it was removed or replaced: nothing may be committed there.
        """
        if not self.in_place:
            raise OutputGoneError(f"{self.path}: was removed or replaced while this command wrote there; it ends")


@contextmanager
def locked(output: Path) -> Iterator[Lock]:
    """Hold the output for this process; a dead process holds nothing.

    Raises:
        InputError: when another process holds it, or the folder cannot be written to.
    """
    private = output / FOLDER
    while True:
        try:
            private.mkdir(parents=True, exist_ok=True, mode=0o700)
            descriptor = os.open(private / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise OutputError(f"-o {output}: cannot be written to: {error.strerror}") from error
        try:
            try:
                got = _lock_within(descriptor, LOCK_SECONDS)
            except OSError as error:
                raise OutputError(
                    f"-o {output}: its file system has no locks ({error.strerror}); choose another"
                ) from error
            if not got:
                who = " (process {pid} on {host})".format_map({"pid": "?", "host": "?", **holder_of(output)})
                raise OutputBusyError(
                    f"-o {output}: another billhook is writing to it{who}; wait for it, or choose another. A lock of a "
                    "machine that died ends with its lease on the file server, in a minute or two"
                )
            lock = Lock(private / LOCK, descriptor)
            if not lock.in_place:  # whoever held it has removed it
                continue
            holder = json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode()
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, holder, 0)
            yield lock
            return
        finally:
            os.close(descriptor)


def holder_of(output: Path) -> dict[str, Any]:
    """Return ``pid`` and ``host`` of the command that holds the output, or was the last to; empty if not known."""
    try:
        found = json.loads((output / FOLDER / LOCK).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def is_locked(output: Path) -> bool:
    """Whether a command is writing to the output."""
    try:
        descriptor = os.open(output / FOLDER / LOCK, os.O_RDONLY)
    except OSError as error:
        raise NoRunError(f"{output}: cannot be read: {error.strerror}; only its owner can") from error
    try:
        return not _lock_within(descriptor, 0.0, fcntl.LOCK_SH)
    finally:
        os.close(descriptor)


def begin_access(output: Path) -> OutputAccess:
    """Wait until no worker of an earlier command can write to the output any more; return how those of this one do.

    Raises:
        RunError: when that takes too long.
    """
    path = output / FOLDER / WORKERS_LOCK
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise disk_failure(str(path), "opening", error) from error
    try:
        if not _lock_within(descriptor, ORPHANS_SECONDS):
            raise NoWorkersError(
                f"{path}: workers of an earlier command still hold it after {ORPHANS_SECONDS:g} s; end their processes "
                "and run the same command again"
            )
        proof = secrets.token_hex(16)
        try:
            os.ftruncate(descriptor, 0)
            os.write(descriptor, proof.encode())
        except OSError as error:
            raise disk_failure(str(path), "writing", error) from error
    finally:
        os.close(descriptor)
    return OutputAccess(str(output), str(path), proof)


def _lock_within(descriptor: int, seconds: float, kind: int = fcntl.LOCK_EX) -> bool:
    until = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= until:
                return False
            time.sleep(0.05)


def create_shards(output: Path, checkpoint: Checkpoint) -> None:
    """Create every shard as a ``.part`` file of its final size that begins with the source's header.

    Raises:
        RunError: when the disk is full or fails.
    """
    try:
        for shard in checkpoint.shards:
            with (output / f"{shard.name}.part").open("wb") as file:
                file.write(shard.header)
                file.truncate(shard.size_bytes)
                file.flush()
                os.fsync(file.fileno())
        sync_file(str(output))
    except OSError as error:
        raise disk_failure(f"{output}/", "creating the shards", error) from error


def unseal(output: Path, checkpoint: Checkpoint) -> None:
    """Mark the shards as unfinished again, where they were finished, and take the manifest away.

    Raises:
        RunError: when a disk fails, or a shard is gone.
    """
    try:
        (output / FOLDER / MANIFEST).unlink(missing_ok=True)
        for shard in checkpoint.shards:
            part = output / f"{shard.name}.part"
            if not part.exists():
                (output / shard.name).rename(part)
        sync_file(str(output))
    except FileNotFoundError as error:
        raise OutputGoneError(f"{error.filename}: is gone; remove {output} and begin again") from error
    except OSError as error:
        raise disk_failure(f"{output}/", "renaming a shard", error) from error


def remove_output(output: Path, checkpoint: Checkpoint, keep_folder: bool) -> None:
    """Remove what a run without a committed block left, and nothing else; a folder that was there stays.

    The journal goes first and the lock last, so that whatever is left at any instant can be begun with again.
    """
    journal_path(output).unlink(missing_ok=True)
    for shard in checkpoint.shards:
        (output / f"{shard.name}.part").unlink(missing_ok=True)
    for path in (output / FOLDER).iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != LOCK:
            path.unlink()
    shutil.rmtree(output / FOLDER, ignore_errors=True)
    if not keep_folder:
        with contextlib.suppress(OSError):  # not empty: somebody else put a file there meanwhile
            output.rmdir()


def copy_tensors(entries: Sequence[TensorEntry], output: Path) -> None:
    """Copy tensors byte for byte to the same shard and offset of the output, and sync.

    Raises:
        RunError: when a disk fails.
    """
    touched = set()
    for entry in entries:
        path = f"{output}/{Path(entry.path).name}.part"
        touched.add(path)
        for start in range(entry.start_bytes, entry.stop_bytes, COPY_BYTES):
            size = min(COPY_BYTES, entry.stop_bytes - start)
            write_bytes(path, start, read_bytes(entry.path, start, size))
    for path in sorted(touched):
        sync_file(path)


def seal(output: Path, checkpoint: Checkpoint, card: str) -> None:
    """Give the shards their names and add the files that travel along.

    Raises:
        RunError: when a disk fails.
    """
    try:
        for shard in checkpoint.shards:
            part = output / f"{shard.name}.part"
            if part.exists():
                part.rename(output / shard.name)
        for name in checkpoint.others:
            if name != CARD:
                shutil.copyfile(checkpoint.folder / name, output / name)
        (output / CARD).write_text(card, encoding="utf-8")
        for path in [*output.iterdir(), output]:
            sync_file(str(path))
    except OSError as error:
        raise disk_failure(f"{output}/", "finishing", error) from error


def write_manifest(output: Path, content: Mapping[str, Any]) -> str:
    """Write the manifest, with the sha256 of every file beside the private folder; return its own sha256.

    Raises:
        RunError: when the disk fails.
    """
    files = hashes_of([path for path in sorted(output.iterdir()) if path.is_file()])
    data = json.dumps({**content, "files": files}, indent=1, sort_keys=True, default=_plain) + "\n"
    path = output / FOLDER / MANIFEST
    try:
        path.write_text(data, encoding="utf-8")
        sync_file(str(path))
    except OSError as error:
        raise disk_failure(str(path), "writing", error) from error
    return hashlib.sha256(data.encode()).hexdigest()


def read_manifest(output: Path) -> dict[str, Any]:
    """Read the manifest.

    Raises:
        InputError: when there is none, or it is no JSON object.
    """
    path = output / FOLDER / MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise NoRunError(f"{output}: no {FOLDER}/{MANIFEST}: not a finished checkpoint of billhook") from error
    except (ValueError, OSError, RecursionError) as error:
        raise DamagedRunError(f"{path}: cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise DamagedRunError(f"{path}: expected a JSON object")
    return content


def size_bytes(output: Path) -> int:
    """Return the size of all files in the output, shards that are not full yet included."""
    return sum(path.stat().st_size for path in output.rglob("*") if path.is_file())


def hashes_of(paths: Sequence[Path]) -> dict[str, str]:
    """Return the sha256 of files, by name."""
    with ThreadPoolExecutor(READ_THREADS, "hash") as threads:
        return dict(zip((path.name for path in paths), threads.map(sha256_of, paths), strict=True))


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    raise TypeError(f"{type(value).__name__} in the manifest")
