"""The session leaves nothing behind, listens on the loopback only, and asks for its token."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from billhook.cluster import session


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, **environment},
    )


def listening_addresses(pids: list[int]) -> set[str]:
    """Local addresses of the TCP sockets that the processes listen on, as hexadecimal text of /proc/net."""
    inodes = set()
    for pid in pids:
        with contextlib.suppress(FileNotFoundError):  # it closed a file, or ended, meanwhile
            for link in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(FileNotFoundError):
                    target = os.readlink(link)
                    if target.startswith("socket:["):
                        inodes.add(target[8:-1])
    addresses = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                addresses.add(fields[1].rpartition(":")[0])
    return addresses


def test_everything_listens_on_the_loopback_interface(ray_cluster: None) -> None:
    addresses = listening_addresses([os.getpid(), *session.marked_processes()])
    loopback = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}
    assert addresses
    assert addresses <= loopback


def test_nobody_else_reaches_the_sessions_sockets(ray_cluster: None) -> None:
    """Ray itself opens the folder that it is given to everybody."""
    assert session._own_folder is not None
    assert session._own_folder.stat().st_mode & 0o077 == 0
    assert list(session._own_folder.glob("*/session_*/sockets/*"))


def test_a_caller_without_the_token_is_refused(cluster_environment: dict[str, str]) -> None:
    attempt = """
        import os
        import ray
        ray.init(address=os.environ["GCS"], log_to_driver=False)
    """
    with_token = run_python(attempt, **cluster_environment)
    assert with_token.returncode == 0, with_token.stderr
    wrong = run_python(attempt, **{**cluster_environment, "RAY_AUTH_TOKEN": "0" * 64})
    assert wrong.returncode != 0
    assert "token" in wrong.stderr.lower()


JOINED = """
    from billhook.cluster.session import ray_session
    from billhook.layerworkers.errors import InputError
    try:
        with ray_session("ADDRESS", 1, 0, 0):
            print("in")
    except InputError as error:
        print(error)
"""


def test_an_address_where_nothing_listens_is_refused_at_once() -> None:
    run = run_python(JOINED.replace("ADDRESS", "127.0.0.1:9"), RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0")
    assert "no Ray cluster answers there" in run.stdout
    assert "Connection refused" in run.stdout


def test_a_token_that_is_asked_for_and_not_there_is_named(cluster_environment: dict[str, str], tmp_path: Path) -> None:
    without = {name: value for name, value in cluster_environment.items() if name != "RAY_AUTH_TOKEN"}
    path = tmp_path / "token"
    for reason in ("No such file or directory", "it is empty"):
        run = run_python(JOINED.replace("ADDRESS", without["GCS"]), **without, RAY_AUTH_TOKEN_PATH=str(path))
        assert f"there is no token in {path} ({reason})" in run.stdout, run.stderr
        path.touch()


STARTED = """
    import os, signal, subprocess, sys
    from billhook.cluster import session
    with session.ray_session(None, 1, 0, 0):
        print(session._own_folder, *session.marked_processes(), flush=True)
        assert session.SESSION_VARIABLE not in os.environ and "RAY_AUTH_TOKEN" not in os.environ
"""


def test_a_session_ends_with_its_command_and_takes_its_folder_along() -> None:
    run = run_python(STARTED)
    assert run.returncode == 0, run.stderr
    folder, *pids = run.stdout.split()
    assert pids
    assert not Path(folder).exists()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_what_the_caller_starts_meanwhile_is_not_ended() -> None:
    child = "        child = subprocess.Popen(['sleep', '60'])\n    print(child.poll()); child.kill()\n"
    run = run_python(STARTED + child)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == "None"


def test_a_ray_address_in_the_environment_is_not_taken_for_an_order() -> None:
    run = run_python(STARTED, RAY_ADDRESS="127.0.0.1:1")
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_signals_reach_python_while_a_session_is_open(name: str) -> None:
    code = f"        os.kill(os.getpid(), signal.{name})\n        import time; time.sleep(5)\n"
    handler = (
        "    def stop(*_): print('handled', flush=True); raise SystemExit(7)\n"
        f"    import signal; signal.signal(signal.{name}, stop)\n"
    )
    run = run_python(handler + STARTED + code)
    assert run.returncode == 7, run.stderr
    assert run.stdout.splitlines()[-1] == "handled"


def test_the_next_command_removes_what_a_killed_one_left() -> None:
    run = run_python(STARTED + "        os.kill(os.getpid(), signal.SIGKILL)\n")
    assert run.returncode == -signal.SIGKILL
    folder, *pids = run.stdout.split()
    assert Path(folder).is_dir()
    session.remove_leftovers()
    assert not Path(folder).exists()
    for _ in range(50):
        left = [pid for pid in pids if state(pid) != "Z"]
        if not left:
            break
        time.sleep(0.1)
    assert not left


def test_a_living_commands_session_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "_root", lambda: tmp_path)
    for name in ("alive", "dead"):
        (tmp_path / f"billhook-ray-{name}").mkdir()
        (tmp_path / f"billhook-ray-{name}" / session.LOCK).touch()
    (tmp_path / "billhook-ray-starting").mkdir()
    with (tmp_path / "billhook-ray-alive" / session.LOCK).open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        session.remove_leftovers()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["billhook-ray-alive", "billhook-ray-starting"]


def state(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"
