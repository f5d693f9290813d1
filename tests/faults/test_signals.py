"""Signals end a run soon, with code 130, and what was done stays done."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from billhook.orchestrator.history import read_history

Lab = Any


@contextmanager
def started(
    lab: Lab, output: Path, *options: str, ignored: signal.Signals | None = None
) -> Iterator[subprocess.Popen[str]]:
    """Begin to prune, in a process group of its own, and wait until the first block is done.

    ignored: as if started by nohup; all other signals have their defaults, whatever these tests were started with.
    """

    def set_signals() -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN if number == ignored else signal.SIG_DFL)

    arguments = ["prune", str(lab.model), "-o", str(output), "--calibration", str(lab.text), "--samples=200"]
    command = [sys.executable, "-m", "billhook.orchestrator", *arguments, "--seqlen=64", "--workers=2", *options]
    with subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=set_signals,  # noqa: PLW1509 - nothing of this process is touched
    ) as process:
        until = time.monotonic() + 120
        while not read_history(output).blocks:
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.02)
        yield process


def left_over(process: subprocess.Popen[str], seconds: float = 10.0) -> list[str]:
    """Return the commands of processes that the run has left, and that have not ended within ``seconds``."""
    until = time.monotonic() + seconds
    while (found := _of_session(process)) and time.monotonic() < until:
        time.sleep(0.1)
    return found


def _of_session(process: subprocess.Popen[str]) -> list[str]:
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if os.getpgid(int(entry.name)) == process.pid or os.getsid(int(entry.name)) == process.pid:
                found.append((entry / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue
    return [command for command in found if command]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("group", [False, True])
def test_a_signal_ends_the_run_within_the_grace_and_some_seconds(
    lab: Lab, tmp_path: Path, request: pytest.FixtureRequest, number: int, group: bool
) -> None:
    if not request.config.getoption("--all-faults"):
        pytest.skip("--all-faults runs them")
    output = tmp_path / "out"
    with started(lab, output, "--grace=5") as process:
        (os.killpg if group else os.kill)(process.pid, number)
        begin = time.monotonic()
        _, err = process.communicate()
        seconds = time.monotonic() - begin
    assert process.returncode == 130, err
    assert "interrupted; the same command goes on" in err.splitlines()[-1]
    assert seconds < 5 + 15
    assert left_over(process) == []
    history = read_history(output)
    assert 1 <= len(history.blocks) < 5
    resumed = lab.resume(output, joined=True)
    assert resumed.code == 0, resumed.err


def test_a_signal_to_the_group_leaves_the_block_in_progress_its_grace(lab: Lab, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with started(lab, output, "--grace=100") as process:
        before = len(read_history(output).blocks)
        os.killpg(process.pid, signal.SIGTERM)
        process.communicate()
    assert process.returncode == 130
    assert len(read_history(output).blocks) > before


def test_a_signal_that_is_ignored_stays_so(lab: Lab, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if not request.config.getoption("--all-faults"):
        pytest.skip("--all-faults runs it")
    output = tmp_path / "out"
    with started(lab, output, ignored=signal.SIGHUP) as process:
        os.kill(process.pid, signal.SIGHUP)
        process.communicate()
    assert process.returncode == 0
    assert read_history(output).done is not None


def test_a_second_signal_ends_it_at_once(lab: Lab, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if not request.config.getoption("--all-faults"):
        pytest.skip("--all-faults runs it")
    output = tmp_path / "out"
    with started(lab, output, "--grace=1000") as process:
        for pid in workers_of(process):
            os.kill(pid, signal.SIGSTOP)  # else the block in progress might be done before
        os.kill(process.pid, signal.SIGINT)
        time.sleep(1)
        assert process.poll() is None
        os.kill(process.pid, signal.SIGINT)
        begin = time.monotonic()
        process.communicate()
        seconds = time.monotonic() - begin
    assert process.returncode == 130
    assert seconds < 5
    assert left_over(process) == []


def workers_of(process: subprocess.Popen[str]) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if os.getsid(int(entry.name)) == process.pid and b"WorkerActor" in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    assert found
    return found
