"""Disks that fail: a clear message, exit code 1, and the same bytes once they are mended."""

from __future__ import annotations

import random
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from billhook.layerworkers.shards import read_header
from billhook.orchestrator.history import read_history
from billhook.orchestrator.journal import journal_path

Lab = Any

ERRORS = [
    ("worker", "preadv", "EIO"),
    ("worker", "pwrite", "EIO"),
    ("worker", "pwrite", "ENOSPC"),
    ("worker", "pwrite", "short"),
    ("worker", "fsync", "EIO"),
    ("driver", "preadv", "EIO"),
    ("driver", "pwrite", "EIO"),
    ("driver", "pwrite", "ENOSPC"),
    ("driver", "pwrite", "short"),
    ("driver", "fsync", "EIO"),
    ("driver", "rename", "EIO"),
    ("driver", "copyfile", "ENOSPC"),
    ("driver", "unlink", "EIO"),
]
"""Role, point and error; ``short``: a write that takes half of what it was given, which is no error."""

FEW = [("worker", "pwrite", "short")]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run all faults where that is asked for, else a few."""
    if "error" in metafunc.fixturenames:
        everything = [(*each, 0) for each in ERRORS]
        chosen = everything if metafunc.config.getoption("--all-faults") else [(*each, 0) for each in FEW]
        metafunc.parametrize(("role", "point", "error", "seed"), chosen)


def test_a_disk_that_fails_is_said_and_the_run_goes_on_once_it_is_mended(
    lab: Lab, tmp_path: Path, role: str, point: str, error: str, seed: int
) -> None:
    rng = random.Random(f"{role} {point} {error} {seed}")
    output = tmp_path / "out"
    ended = lab.prune(output, lab.fault(rng, role, point, error), joined=True)
    assert ended.happened
    assert "Traceback" not in ended.err
    if error == "short":
        assert ended.code == 0, ended.err
    else:
        assert ended.code == 1, ended.err
        message = {"EIO": "Input/output error", "ENOSPC": "disk is full"}[error]
        assert message in ended.err.splitlines()[-1]
        assert lab.prune(output, joined=True, workers=1).code == 0
    assert lab.contents(output) == lab.expected


def test_what_lies_after_the_last_commit_is_of_no_account(
    lab: Lab, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """The journal's tail is torn, uncommitted tensors are rubbish, the next block's inputs are there by half."""
    if not request.config.getoption("--all-faults"):
        pytest.skip("test_resume.py has most of it in one process")
    output = tmp_path / "out"
    rng = random.Random(1)
    assert lab.prune(output, lab.fault(rng, "worker", "solve_stage", "kill all")).code == -9
    done = len(read_history(output).blocks)
    with journal_path(output).open("ab") as file:
        file.write(b'{"index":%d,"kept_inputs":true,"kind":"block","li' % done)
    for part in output.glob("*.part"):
        _, entries = read_header(part)
        with part.open("r+b") as file:
            for entry in entries:
                if not any(f"layers.{block}." in entry.name for block in range(done)):
                    file.seek(entry.start_bytes)
                    file.write(rng.randbytes(entry.size_bytes))
    activations = output / "billhook" / "activations"
    activations.mkdir(exist_ok=True)
    for block in range(done + 1, 5):
        (activations / f"inputs-{block:05d}.safetensors").write_bytes(rng.randbytes(1000))
    assert lab.resume(output, joined=True, workers=1).code == 0
    assert lab.contents(output) == lab.expected
    assert not activations.exists()


@pytest.mark.skipif(
    subprocess.run(["unshare", "-Urm", "true"], capture_output=True, check=False).returncode != 0
    if shutil.which("unshare")
    else True,
    reason="no mount namespaces here",
)
def test_a_disk_that_fills_up_is_said_with_figures_and_the_run_goes_on_once_there_is_room(
    lab: Lab, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if not request.config.getoption("--all-faults"):
        pytest.skip("starts Ray twice; ENOSPC is injected above")
    size_kib = sum(path.stat().st_size for path in lab.model.glob("*.safetensors")) // 1024
    command = [sys.executable, "-m", "billhook.orchestrator", *lab.command(tmp_path / "disk/out")]
    command += ["--workers=1", "--disk=1GiB", "--keep-inputs=never"]
    script = f"""
        mkdir disk && mount -t tmpfs -o size=4g none disk
        (until ls disk/out/*.part; do sleep 0.1; done; mount -o remount,size={size_kib // 2}k disk) > log 2>&1 &
        {shlex.join(command)}; echo $?; ls disk/out; kill $! 2> /dev/null
        mount -o remount,size=4g disk
        {shlex.join(command)}; echo $?; cp -r disk/out .
    """
    done = subprocess.run(
        ["unshare", "-Urm", "sh", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    first, *listed, second = done.stdout.split()
    assert (first, second) == ("1", "0"), done.stderr
    assert re.search(r"the disk is full: .* failed, \d+ bytes are free", done.stderr), done.stderr
    assert any(name.endswith(".part") for name in listed)
    assert lab.contents(tmp_path / "out") == lab.expected
