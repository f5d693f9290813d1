"""A Ray session for the length of one command: started here and stopped again, or joined.

What is started here listens on the loopback interface only, asks every caller for a token that is made for the
session, sends no usage statistics, and serves no dashboard unless it is asked for.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from billhook.layerworkers.errors import ClusterError, NoWorkersError, OptionError

SESSION_VARIABLE = "BILLHOOK_SESSION"
"""Environment variable, set to the session's folder, that marks every process of a session."""

LOCK = "owner.lock"
"""File in the session's folder that its command holds a lock on."""

TOKEN_FILE = "~/.ray/auth_token"
"""Where Ray looks for a cluster's token when the environment does not say."""

CONNECT_SECONDS = 10.0
"""How long the head node of a cluster to be joined may take to accept a connection."""


@dataclass(frozen=True)
class Dashboard:
    """Where Ray's dashboard is, for as long as the session lasts."""

    url: str
    token_file: Path
    """Only this user can read it."""


_own_folder: Path | None = None
"""Folder of the session that this process has started and not yet stopped."""

_own_environment: Mapping[str, str] = {}
"""What that session's processes inherited for the workers' sake."""

_LOOPBACK_ONLY = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Despite its name this is how Ray is told to bind to the loopback interface on any system.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_DISABLE_IMPORT_WARNING": "1",
}


@contextmanager
def ray_session(
    address: str | None,
    cpus: int,
    gpus: int,
    object_store_bytes: int,
    environment: Mapping[str, str] | None = None,
    dashboard: bool = False,
) -> Iterator[Dashboard | None]:
    """Join the Ray cluster at ``address``, or start one with ``cpus`` and ``gpus`` on this machine, and leave it again.

    What is started here has the variables of ``environment``, and so do its workers. With ``dashboard`` it serves
    Ray's dashboard on the loopback interface, and the context yields where.
    A session that this process is already connected to is used as it is. Leftovers of commands that were killed are
    removed first.

    Raises:
        InputError: when there is no cluster at ``address``, or it does not let this process in, or the dashboard's
            packages are missing.
    """
    remove_leftovers()
    if "ray" in sys.modules:
        import ray

        if ray.is_initialized():
            yield None
            return
    if address is not None:
        with _join(address):
            yield None
        return
    with _start(cpus, gpus, object_store_bytes, environment or {}, dashboard) as found:
        yield found


def check_dashboard() -> None:
    """Check that Ray's dashboard can be served.

    Raises:
        InputError: when packages are missing.
    """
    try:
        import_module("ray.dashboard.optional_deps")
    except ImportError as error:
        raise OptionError(
            f"--dashboard: Ray's dashboard needs packages that are not installed ({error.name}); install them: "
            "pip install 'ray[default]'"
        ) from error


@contextmanager
def _join(address: str) -> Iterator[None]:
    import ray

    with _signals_and_output_are_ours():
        _check_admission(address)
        try:
            ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False, configure_logging=False)
        except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            raise ClusterError(
                f"--address {address}: the Ray cluster there answers, but this command cannot join it "
                f"({' '.join(str(error).split())}); give the command on a machine that 'ray start' has made part of "
                "the cluster, with the same Python and Ray"
            ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _check_admission(address: str) -> None:
    """Check that a cluster listens at ``address`` and takes this process's token; Ray alone would try for minutes.

    Raises:
        InputError: when not.
    """
    if "://" in address:
        raise ClusterError(f"--address {address}: expected HOST:PORT of the head's control store, as HOST:6379")
    import ray
    from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
    from ray._private.services import canonicalize_bootstrap_address
    from ray._raylet import GcsClient  # type: ignore[attr-defined]

    try:
        found = canonicalize_bootstrap_address(address) or ""
        host, _, port = found.rpartition(":")
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except (OSError, ValueError) as error:
        raise _no_cluster(address, str(error)) from error
    if address == "auto":
        maybe_enable_token_auth_if_token_available(warn_if_disabled=False)  # as ray.init does, for this address alone
    _check_token_source()
    try:
        GcsClient(address=found)
    except ray.exceptions.AuthenticationError as error:
        raise ClusterError(
            f"--address {address}: the Ray cluster there refused this command: the token is missing or wrong; set "
            f"RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to a file with the cluster's token (default: {TOKEN_FILE})"
        ) from error
    except ray.exceptions.RayError as error:
        raise _no_cluster(address, str(error)) from error


def _check_token_source() -> None:
    """Check that there is a token where one is asked for: without one, Ray aborts the process.

    Raises:
        InputError: when there is none.
    """
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "token" or os.environ.get("RAY_AUTH_TOKEN"):
        return
    path = os.environ.get("RAY_AUTH_TOKEN_PATH") or TOKEN_FILE
    try:
        if Path(path).expanduser().read_text().strip():
            return
        reason = "it is empty"
    except OSError as error:
        reason = str(error.strerror)
    raise ClusterError(
        f"RAY_AUTH_MODE=token, but there is no token in {path} ({reason}): put the cluster's token there, or set "
        "RAY_AUTH_TOKEN_PATH to the file that holds it"
    )


def _no_cluster(address: str, reason: str) -> ClusterError:
    return ClusterError(
        f"--address {address}: no Ray cluster answers there ({reason}); start one with 'ray start --head', or leave "
        "--address out to use this machine"
    )


@contextmanager
def _start(
    cpus: int, gpus: int, object_store_bytes: int, environment: Mapping[str, str], dashboard: bool
) -> Iterator[Dashboard | None]:
    global _own_folder, _own_environment
    if dashboard:
        check_dashboard()
    folder, own_lock = _claimed_folder()
    _own_folder, _own_environment = folder, environment
    own = {**environment, **_LOOPBACK_ONLY, "RAY_AUTH_TOKEN": secrets.token_hex(32), SESSION_VARIABLE: str(folder)}
    try:
        with _environment(own), _signals_and_output_are_ours():
            import ray

            _reload_ray_environment()
            url = _init(
                address="local",
                num_cpus=cpus,
                num_gpus=gpus,
                include_dashboard=dashboard,
                dashboard_host="127.0.0.1",
                object_store_memory=max(object_store_bytes, 80 << 20),
                logging_level=logging.ERROR,
                log_to_driver=False,
                configure_logging=False,
                _temp_dir=str(folder / "r"),  # Ray opens it to everybody: what it lies in stays ours alone
                _system_config={
                    "enable_worker_prestart": False,
                    "prestart_worker_first_driver": False,
                    "worker_niceness": 0,  # Ray would start them at 15, behind everything else on the machine
                },
            )
        try:
            yield Dashboard(f"http://{url}", _token_file(folder, own["RAY_AUTH_TOKEN"])) if dashboard else None
        finally:
            ray.shutdown()
            _reload_ray_environment()
    finally:
        _own_folder, _own_environment = None, {}
        _remove(folder)
        os.close(own_lock)


def _claimed_folder() -> tuple[Path, int]:
    """Return a new folder for a session and a descriptor that holds its lock."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix="billhook-ray-", dir=_root()))
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o600)  # not inherited: Python's files never are
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (folder / LOCK).exists():
            return folder, lock
        os.close(lock)  # another command took it for a leftover before it was locked


def _token_file(folder: Path, token: str) -> Path:
    path = folder / "token"
    path.touch(mode=0o600)
    path.write_text(token)
    return path


def _init(**options: Any) -> str:
    """Start Ray; return where its dashboard listens, HOST:PORT, or an empty string."""
    import ray

    try:
        return str(ray.init(**options).dashboard_url or "")
    except Exception as error:  # Ray raises just that when its processes are late
        reason = str(error).strip().partition("\n")[0]
        raise NoWorkersError(
            f"Ray did not start: {reason}; the machine may be too busy: run the same command again"
        ) from error


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Set environment variables for the processes that are started meanwhile, and for no others."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _signals_and_output_are_ours() -> Iterator[None]:
    """Keep signals from the processes that Ray starts meanwhile, and Ray from this one's handlers and output.

    What is sent to the whole process group then reaches this process alone, which ends the others when it is time. Of
    SIGTERM Ray's own processes make use, so it is not blocked in them; but they get process groups of their own.
    """
    import ray

    blocked = (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    popen, set_handler = subprocess.Popen.__init__, ray._private.utils.set_sigterm_handler
    listen = ray._private.worker.listen_error_messages

    def in_own_group(self: Any, *args: Any, **kwargs: Any) -> None:
        popen(self, *args, **{"process_group": 0, **kwargs})

    subprocess.Popen.__init__ = in_own_group  # type: ignore[method-assign]
    ray._private.utils.set_sigterm_handler = lambda handler: None  # Ray's exits with 15, without a word
    ray._private.worker.listen_error_messages = lambda *_: None  # it would print to standard output: calls fail anyway
    try:
        yield
    finally:
        subprocess.Popen.__init__ = popen  # type: ignore[method-assign]
        ray._private.utils.set_sigterm_handler = set_handler
        ray._private.worker.listen_error_messages = listen
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                if handler is not None:
                    signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _reload_ray_environment() -> None:
    """Make Ray read its environment again: it does so only once per process, and may have been imported before."""
    from ray._private import ray_constants
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    loopback = os.environ.get("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER") == "0"
    ray_constants.ENABLE_RAY_CLUSTER = sys.platform == "linux" and not loopback
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def remove_leftovers() -> None:
    """End the processes and remove the folders of this user's sessions whose command no longer lives.

    A living command holds a lock on a file in its session's folder, also when it is in another container that shares
    the folder; a dead one holds nothing.
    """
    for folder in _root().glob("billhook-ray-*"):
        try:
            if folder.stat().st_uid != os.getuid():
                continue
            lock = os.open(folder / LOCK, os.O_RDWR)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(folder)
        except BlockingIOError:
            pass
        finally:
            os.close(lock)


def inherited() -> Mapping[str, str]:
    """Return the environment that was given to the session that this process started; empty where it joined one."""
    return _own_environment


def marked_processes() -> list[int]:
    """Return the ids of the Ray processes of the session that this process started."""
    return _processes_of(_own_folder) if _own_folder is not None else []


def end_own_session() -> None:
    """End the processes of the session that this process started, if any, without waiting for anything."""
    if _own_folder is not None:
        _remove(_own_folder)


def _remove(folder: Path) -> None:
    for pid in _processes_of(folder):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
    shutil.rmtree(folder, ignore_errors=True)


def _processes_of(folder: Path) -> list[int]:
    """Return the ids of the processes that belong to the session in ``folder``, without this one.

    They carry its mark in their environment; those whose title has overwritten it have a file of the session open.
    """
    mark = f"{SESSION_VARIABLE}={folder}".encode()
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            pid = int(process.name)
            if pid != os.getpid() and (
                mark in (process / "environ").read_bytes().split(b"\0")
                or ((process / "cmdline").read_bytes().startswith(b"ray::") and _has_open(process, folder))
            ):
                found.append(pid)
    return found


def _has_open(process: Path, folder: Path) -> bool:
    return any(os.readlink(link).startswith(f"{folder}/") for link in (process / "fd").iterdir())


def _root() -> Path:
    """Return where session folders go: short, since Ray puts sockets there (107 bytes at most for the whole path)."""
    return Path("/tmp") if os.access("/tmp", os.W_OK) else Path(tempfile.gettempdir())
