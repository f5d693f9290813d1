"""Runs of the real command in processes of its own, with one fault each; see ``injection/sitecustomize.py``."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

INJECTION = Path(__file__).parent / "injection"

OPTIONS = (
    *("--samples", "18", "--seqlen", "32", "--partition-rows", "32"),
    *("--keep-inputs", "2", "--activations", "disk"),
)
"""Five partitions of four samples, the last one short; inputs of every second block are kept."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let ``make test-faults`` ask for everything."""
    parser.addoption("--all-faults", action="store_true", help="every fault instead of a few")


@dataclass(frozen=True)
class Fault:
    """One fault: the ``count``-th call of ``point`` in the first process of ``role`` that gets there."""

    role: str
    point: str
    count: int
    action: str


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str
    happened: bool
    """Whether the fault was reached."""


@dataclass(frozen=True)
class Lab:
    """A model, and what an uninterrupted run makes of it."""

    model: Path
    text: Path
    cluster: dict[str, str]
    expected: dict[str, bytes]
    calls: dict[tuple[str, str], int]
    """How often each point is reached in it, by role and point; of all workers together."""

    def prune(self, output: Path, fault: Fault | None = None, joined: bool = False, workers: int = 2) -> Ended:
        """Run ``billhook prune``, with a fault or without; ``joined``: on a Ray cluster that outlives the command."""
        return run(
            [*prune_command(self.model, self.text, output), f"--workers={workers}"],
            output,
            self.model,
            fault,
            self.cluster if joined else {},
        )

    def resume(self, output: Path, fault: Fault | None = None, joined: bool = False, workers: int = 2) -> Ended:
        """Run ``billhook prune --resume``; the same."""
        return run(
            ["prune", "--resume", str(output), f"--workers={workers}"],
            output,
            self.model,
            fault,
            self.cluster if joined else {},
        )

    def command(self, output: Path) -> list[str]:
        """Return the arguments of ``billhook`` that prune the model, but for the number of workers."""
        return prune_command(self.model, self.text, output)

    def contents(self, output: Path) -> dict[str, bytes]:
        """Return everything that must not depend on how a run went."""
        return contents_of(output)

    def fault(self, rng: random.Random, role: str, point: str, action: str) -> Fault:
        """Return a fault at a random one of the calls that an uninterrupted run makes."""
        total = self.calls[role, point]
        one_process = total if role == "driver" else total // 2
        return Fault(role, point, rng.randint(1, max(1, one_process)), action)


def prune_command(model: Path, text: Path, output: Path) -> list[str]:
    return ["prune", str(model), "-o", str(output), "--calibration", str(text), *OPTIONS]


def run(
    arguments: list[str], output: Path, model: Path, fault: Fault | dict[str, Any] | None, cluster: dict[str, str]
) -> Ended:
    """Run the command in a session of its own; ``fault`` may be the raw specification.

    cluster: environment with which a Ray cluster is joined; empty: the command starts its own.
    """
    marks = output.with_name(f"{output.name}-marks-{len(list(output.parent.iterdir()))}")
    marks.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(INJECTION), "BILLHOOK_FAULT_FILE": str(marks / "fault"), **cluster}
    file = Path(environment["BILLHOOK_FAULT_FILE"])
    if fault is not None:
        specification = fault if isinstance(fault, dict) else vars(fault)
        within = [str(output.resolve()), str(model.resolve())]
        file.write_text(json.dumps({"folder": str(marks), "within": within, **specification}))
    try:
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "billhook.orchestrator",
                *arguments,
                *("--address", cluster["GCS"] if cluster else "local"),  # else a resumed run joins what it had joined
            ],
            capture_output=True,
            text=True,
            env=environment,
            start_new_session=True,
            timeout=280,
            check=False,
        )
    finally:
        file.unlink(missing_ok=True)
    return Ended(done.returncode, done.stdout, done.stderr, (marks / "happened").exists())


def contents_of(output: Path) -> dict[str, bytes]:
    files = {path.name: path.read_bytes() for path in output.iterdir() if path.is_file()}
    return {**files, "manifest": (output / "billhook" / "manifest.json").read_bytes()}


CLUSTER = """
import json, sys
from pathlib import Path
from billhook.cluster.session import marked_processes, ray_session
with ray_session(None, 4, 0, 200 << 20):
    import ray
    environments = [Path(f"/proc/{pid}/environ").read_bytes().split(bytes(1)) for pid in marked_processes()]
    tokens = [each[15:].decode() for every in environments for each in every if each.startswith(b"RAY_AUTH_TOKEN=")]
    print(json.dumps([ray.get_runtime_context().gcs_address, tokens[0]]), flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="session")
def faulty_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A Ray cluster whose workers have faults; what a process needs in its environment to join it."""
    file = str(tmp_path_factory.mktemp("cluster") / "fault")
    environment = {**os.environ, "PYTHONPATH": str(INJECTION), "BILLHOOK_FAULT_FILE": file}
    with subprocess.Popen(
        [sys.executable, "-c", CLUSTER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
    ) as process:
        assert process.stdout is not None
        address, token = json.loads(process.stdout.readline())
        yield {
            "BILLHOOK_FAULT_FILE": file,
            "GCS": address,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": token,
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        }
        assert process.stdin is not None
        process.stdin.close()


@pytest.fixture(scope="session")
def lab(
    make_model: Callable[..., Path],
    text_file: Path,
    faulty_cluster: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Lab:
    model = make_model(num_hidden_layers=5)
    folder = tmp_path_factory.mktemp("whole")
    output = folder / "out"
    ended = run([*prune_command(model, text_file, output), "--workers=2"], output, model, {}, faulty_cluster)
    assert ended.code == 0, ended.err
    marks = next(folder.glob("out-marks-*"))
    names = (path.name.partition(".") for path in marks.iterdir() if "." in path.name)
    calls = {(role, point): (marks / f"{role}.{point}").stat().st_size for role, _, point in names}
    return Lab(model, text_file, faulty_cluster, contents_of(output), calls)
