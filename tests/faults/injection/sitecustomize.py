"""Makes one call fail, in whichever process of a run reaches it; put this folder on PYTHONPATH.

The file that ``BILLHOOK_FAULT_FILE`` names holds JSON: ``folder`` (for marks), ``role`` (``driver`` or ``worker``),
``point``, ``count`` (which call), ``action``. A fault happens once per folder, in which ``happened`` then holds the
name of the machine. Without ``action`` calls are counted only: each appends a byte to ``folder/role.point``.
"""

from __future__ import annotations

import errno
import functools
import importlib.abc
import importlib.util
import json
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

OS_POINTS = ("preadv", "pwrite", "fsync", "rename", "unlink")
"""Functions of ``os``: reading and writing tensors, syncing, finishing."""

MODULE_POINTS = {
    "billhook.layerworkers.statistics": ("Accumulator.add",),
    "billhook.layerworkers.solving": ("solve_stage", "sum_over_workers", "_solve_share", "_gather_"),
    "billhook.cluster.scribe": ("RemoteFiles.write",),
    "billhook.orchestrator.journal": ("append",),
    "billhook.orchestrator.output": ("sha256_of",),
}
"""Functions of ours: in the middle of the forward pass, of solving, of writing, of committing, of finishing."""

_lock = threading.Lock()
_calls: dict[str, int] = {}
_kill = os.kill


@functools.cache
def fault() -> dict[str, Any]:
    """Return the fault of this run, as it is when the first point is reached; empty for none."""
    try:
        found: dict[str, Any] = json.loads(Path(os.environ["BILLHOOK_FAULT_FILE"]).read_text())
    except FileNotFoundError:
        return {}
    return found


def due(point: str, role: str) -> str | None:
    """Count a call; return the action that is due."""
    if "action" not in fault():
        with Path(fault()["folder"], f"{role}.{point}").open("ab") as file:
            file.write(b".")
        return None
    if (fault()["role"], fault()["point"]) != (role, point):
        return None
    with _lock:
        _calls[point] = _calls.get(point, 0) + 1
        if _calls[point] != fault()["count"]:
            return None
    try:
        happened = os.open(Path(fault()["folder"], "happened"), os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        return None
    os.write(happened, socket.gethostname().encode())
    os.close(happened)
    return str(fault()["action"])


def strike(action: str) -> None:
    """Kill this process, the driver, or all processes of the run, without a chance to clean up; or hold this one."""
    if action == "freeze":
        _kill(os.getpid(), signal.SIGSTOP)
        return
    if action == "wait":
        while not Path(fault()["folder"], "go").exists():
            time.sleep(0.05)
        return
    if action == "kill driver":
        _kill(int(Path(fault()["folder"], "driver").read_text()), signal.SIGKILL)
        return
    if action == "kill all":
        mark = os.environ["BILLHOOK_FAULT_FILE"].encode()
        for environ in Path("/proc").glob("[0-9]*/environ"):
            pid = int(environ.parent.name)
            try:
                if pid != os.getpid() and mark in environ.read_bytes():
                    _kill(pid, signal.SIGKILL)
            except OSError:
                continue
    _kill(os.getpid(), signal.SIGKILL)


def wrapped(real: Callable[..., Any], point: str, role: str) -> Callable[..., Any]:
    """Return ``real`` with the fault before it."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if not fault() or (point in OS_POINTS and not _within(args[0])):
            return real(*args, **kwargs)
        action = due(point, role)
        if action is None:
            return real(*args, **kwargs)
        if action == "torn":  # a write of which half arrived
            real(args[0], bytes(args[1])[: max(1, len(args[1]) // 2)], *args[2:])
            strike("kill")
        if action == "short":
            return real(args[0], bytes(args[1])[: max(1, len(args[1]) // 2)], *args[2:])
        if action in errno.errorcode.values():
            number = getattr(errno, action)
            raise OSError(number, os.strerror(number))
        strike(action)
        return real(*args, **kwargs)

    return call


def _within(file: Any) -> bool:
    """Whether a descriptor or path lies in one of the run's folders."""
    path = os.readlink(f"/proc/self/fd/{file}") if isinstance(file, int) else os.fspath(file)
    return any(str(path).startswith(folder) for folder in fault()["within"])


class _PatchAfterImport(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, role: str):
        self._role = role

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name not in MODULE_POINTS:
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        assert spec is not None
        self._loader, spec.loader = spec.loader, self
        return spec

    def exec_module(self, module: ModuleType) -> None:
        assert self._loader is not None
        self._loader.exec_module(module)
        for point in MODULE_POINTS[module.__name__]:
            *owners, name = point.split(".")
            owner: Any = module
            for each in owners:
                owner = getattr(owner, each)
            setattr(owner, name, wrapped(getattr(owner, name), point, self._role))


def _install() -> None:
    arguments = sys.orig_argv
    if "billhook.orchestrator" in arguments:
        role = "driver"
        if fault():
            Path(fault()["folder"], "driver").write_text(str(os.getpid()))
    elif any(argument.endswith("default_worker.py") for argument in arguments):
        role = "worker"
    else:
        return
    for point in OS_POINTS:
        setattr(os, point, wrapped(getattr(os, point), point, role))
    if role == "driver":
        shutil.copyfile = wrapped(shutil.copyfile, "copyfile", role)  # type: ignore[assignment]
    sys.meta_path.insert(0, _PatchAfterImport(role))


if "BILLHOOK_FAULT_FILE" in os.environ:
    _install()
