"""A Ray session for the length of one command: started here and stopped again, or joined.

What is started here listens on the loopback interface only, asks every caller for a token that is made for the
session, sends no usage statistics, and serves no dashboard.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from billhook.layerworkers.errors import InputError

SESSION_VARIABLE = "BILLHOOK_SESSION"
"""Environment variable, set to the session's folder, that marks every process of a session."""

_LOOPBACK_ONLY = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Despite its name this is how Ray is told to bind to the loopback interface on any system.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_DISABLE_IMPORT_WARNING": "1",
}


@contextmanager
def ray_session(address: str | None, cpus: int, gpus: int, object_store_bytes: int) -> Iterator[None]:
    """Join the Ray cluster at ``address``, or start one with ``cpus`` and ``gpus`` on this machine, and leave it again.

    A session that this process is already connected to is used as it is. Leftovers of commands that were killed are
    removed first.

    Raises:
        InputError: when there is no cluster at ``address``.
    """
    remove_leftovers()
    if "ray" in sys.modules:
        import ray

        if ray.is_initialized():
            yield
            return
    started = _join(address) if address is not None else _start(cpus, gpus, object_store_bytes)
    with started:
        yield


@contextmanager
def _join(address: str) -> Iterator[None]:
    import ray

    try:
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False, configure_logging=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise InputError(
            f"--address {address}: no Ray cluster answers there ({str(error).splitlines()[0]}); start one with "
            "'ray start --head', or leave --address out to use this machine"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _start(cpus: int, gpus: int, object_store_bytes: int) -> Iterator[None]:
    folder = Path(tempfile.mkdtemp(prefix="billhook-ray-", dir=_root()))
    (folder / "owner.json").write_text(json.dumps({"pid": os.getpid(), "started": _start_time(os.getpid())}))
    environment = {
        **_LOOPBACK_ONLY,
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        SESSION_VARIABLE: str(folder),
    }
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        import ray

        _reload_ray_environment()
        ray.init(
            num_cpus=cpus,
            num_gpus=gpus,
            include_dashboard=False,
            object_store_memory=max(object_store_bytes, 80 << 20),
            logging_level=logging.ERROR,
            log_to_driver=False,
            configure_logging=False,
            _temp_dir=str(folder),
            _system_config={"enable_worker_prestart": False, "prestart_worker_first_driver": False},
        )
        try:
            yield
        finally:
            ray.shutdown()
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        _reload_ray_environment()
        _remove(folder)


def _reload_ray_environment() -> None:
    """Make Ray read its environment again: it does so only once per process, and may have been imported before."""
    from ray._private import ray_constants
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    loopback = os.environ.get("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER") == "0"
    ray_constants.ENABLE_RAY_CLUSTER = sys.platform == "linux" and not loopback
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def remove_leftovers() -> None:
    """End the processes and remove the folders of this user's sessions whose command no longer lives."""
    for folder in _root().glob("billhook-ray-*"):
        try:
            if folder.stat().st_uid != os.getuid():
                continue
            owner = json.loads((folder / "owner.json").read_text())
        except (OSError, ValueError):
            continue
        if _start_time(owner["pid"]) != owner["started"]:
            _remove(folder)


def _remove(folder: Path) -> None:
    for pid in _processes_of(folder):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
    shutil.rmtree(folder, ignore_errors=True)


def marked_processes() -> list[int]:
    """Return the ids of the processes of the session that this process started, without this one."""
    folder = os.environ.get(SESSION_VARIABLE)
    return _processes_of(Path(folder)) if folder else []


def _processes_of(folder: Path) -> list[int]:
    """Return the ids of the processes that carry the session's mark, without this one."""
    mark = f"{SESSION_VARIABLE}={folder}".encode()
    marked = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            pid = int(environ.parent.name)
            if pid != os.getpid() and mark in environ.read_bytes().split(b"\0"):
                marked.append(pid)
    return marked


def _start_time(pid: int) -> str | None:
    """Return when a process started (clock ticks since boot), which tells it from a later one with the same id."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return None


def _root() -> Path:
    """Return where session folders go: short, since Ray puts sockets there (107 bytes at most for the whole path)."""
    return Path("/tmp") if os.access("/tmp", os.W_OK) else Path(tempfile.gettempdir())
