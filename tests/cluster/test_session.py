"""The session leaves nothing behind, listens on the loopback only, and asks for its token."""

from __future__ import annotations

import contextlib
import json
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


def test_a_caller_without_the_token_is_refused(ray_cluster: None) -> None:
    import ray

    address = ray.get_runtime_context().gcs_address
    attempt = """
        import os, sys
        import ray
        ray.init(address=sys.argv[1] if len(sys.argv) > 1 else os.environ["GCS"], log_to_driver=False)
    """
    with_token = run_python(attempt, GCS=address)
    assert with_token.returncode == 0, with_token.stderr
    wrong = run_python(attempt, GCS=address, RAY_AUTH_TOKEN="0" * 64, RAY_NUM_REDIS_GET_RETRIES="2")
    assert wrong.returncode != 0
    assert "token" in wrong.stderr.lower()


def test_a_session_ends_with_its_command_and_takes_its_folder_along(tmp_path: Path) -> None:
    code = """
        import os
        from billhook.cluster.session import SESSION_VARIABLE, marked_processes, ray_session
        with ray_session(None, 1, 0, 0):
            print(os.environ[SESSION_VARIABLE], *marked_processes())
        assert not os.environ.get(SESSION_VARIABLE) and not os.environ.get("RAY_AUTH_TOKEN")
    """
    run = run_python(code, **unmarked())
    assert run.returncode == 0, run.stderr
    folder, *pids = run.stdout.split()
    assert pids
    assert not Path(folder).exists()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_the_next_command_removes_what_a_killed_one_left() -> None:
    code = """
        import os, signal
        from billhook.cluster.session import SESSION_VARIABLE, marked_processes, ray_session
        with ray_session(None, 1, 0, 0):
            print(os.environ[SESSION_VARIABLE], *marked_processes(), flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
    """
    run = run_python(code, **unmarked())
    assert run.returncode == -signal.SIGKILL
    folder, *pids = run.stdout.split()
    assert Path(folder).is_dir()
    session.remove_leftovers()
    assert not Path(folder).exists()
    for _ in range(50):
        left = [pid for pid in pids if Path(f"/proc/{pid}").exists() and "Z" not in state(pid)]
        if not left:
            break
        time.sleep(0.1)
    assert not left


def test_a_living_commands_session_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "_root", lambda: tmp_path)
    alive, dead = tmp_path / "billhook-ray-alive", tmp_path / "billhook-ray-dead"
    for folder, started in ((alive, session._start_time(os.getpid())), (dead, "1")):
        folder.mkdir()
        (folder / "owner.json").write_text(json.dumps({"pid": os.getpid(), "started": started}))
    (tmp_path / "billhook-ray-starting").mkdir()
    session.remove_leftovers()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["billhook-ray-alive", "billhook-ray-starting"]


def unmarked() -> dict[str, str]:
    """An environment without the mark of the session that this test run may be in."""
    return {session.SESSION_VARIABLE: "", "RAY_AUTH_TOKEN": "", "RAY_ADDRESS": ""}


def state(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"
