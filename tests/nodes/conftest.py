"""A lab of Ray nodes on one machine: each has its own network, address, processes, host name, disk and shared memory.

A node is a set of namespaces, held by a process that ends with the test run, however that ends; with it go the node's
processes, mounts and network. A bridge in a namespace of its own connects the nodes: the machine's network is not
touched. ``Lab.disk`` is a path that is the same on all nodes, with another folder behind it on each.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

INJECTION = Path(__file__).parents[1] / "faults" / "injection"

OPTIONS = ("--samples", "18", "--seqlen", "32", "--partition-rows", "32", "--activations", "disk")
"""Five partitions of four samples, the last one short; several row partitions in every linear."""

ADDRESSES = {name: f"10.99.0.{number}" for number, name in enumerate(("head", "one", "two", "three"), 1)}

ACTORS = ("ray::WorkerActor", "ray::Attendance", "ray::Scribe")

RAY_ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # else whatever the machine does beside comes first
    "RAY_DISABLE_IMPORT_WARNING": "1",
    "RAY_enable_worker_prestart": "0",
    "RAY_prestart_worker_first_driver": "0",
    # A node without power is missed after a few seconds instead of half a minute.
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
}

BRIDGE = "ip link add bridge type bridge && ip link set bridge up && echo up && exec cat"
"""``cat`` ends when the test run does: its input is a pipe from there."""

MACHINE = """
hostname "$1" && ip link set lo up && mount --bind "$2" "$3" && mount -t tmpfs -o size=512m none /dev/shm &&
echo up && exec cat
"""

PLUG = """
ip link add "$1" type veth peer name eth0 netns "$3" && ip link set "$1" master bridge up &&
nsenter --target "$3" --net sh -c "ip addr add $2/24 dev eth0 && ip link set eth0 up && ip route add default dev eth0"
"""


@dataclass(frozen=True)
class Node:
    """A machine of the lab, from power on to power off."""

    name: str
    address: str
    disk: Path
    """What it has as its disk, as seen from outside."""
    holder: subprocess.Popen[str]
    init: int
    """Its first process, as numbered outside."""

    def command(self, *arguments: str) -> list[str]:
        """Return the command that runs ``arguments`` on this node."""
        return ["nsenter", f"--target={self.init}", "--net", "--mount", "--uts", "--pid", *arguments]

    def actors(self) -> list[str]:
        """Return the titles of the processes of ours that Ray runs on this node."""
        done = subprocess.run(self.command("ps", "-eo", "args"), capture_output=True, text=True, check=True)
        return [line for line in done.stdout.splitlines() if line.startswith(ACTORS)]


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str


@dataclass
class Lab:
    """Nodes of one Ray cluster: ``head`` has no CPU to compute with, the others have one each."""

    folder: Path
    text: Path
    model: Path
    bridge: subprocess.Popen[str]
    environment: dict[str, str]
    nodes: dict[str, Node] = field(default_factory=dict)
    """Those that have power."""

    @property
    def disk(self) -> Path:
        """A path with another folder behind it on each node: there is its own copy of the source, and its scratch."""
        return self.folder / "disk"

    @property
    def shared(self) -> Path:
        """A folder that all nodes see."""
        return self.folder / "shared"

    def start(self, *names: str) -> None:
        """Give power to those of the nodes that have none, and have them join the cluster."""
        missing = [name for name in names if name not in self.nodes]
        for name in missing:
            self.nodes[name] = self._power_on(name)
        joining = [subprocess.Popen(self._join(self.nodes[name]), **self._quiet()) for name in missing]
        for process in joining:
            _, error = process.communicate(timeout=120)
            assert process.returncode == 0, error

    def _power_on(self, name: str) -> Node:
        disk = self.folder / "disks" / name
        shutil.rmtree(disk, ignore_errors=True)
        shutil.copytree(self.model, disk / "model")
        namespaces = ("--net", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc")
        process = holder("unshare", *namespaces, "sh", "-c", MACHINE, "sh", name, str(disk), str(self.disk))
        init = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().strip()
        self._at_the_bridge("sh", "-c", PLUG, "sh", name, ADDRESSES[name], init)
        return Node(name, ADDRESSES[name], disk, process, int(init))

    def _join(self, node: Node) -> list[str]:
        role = [f"--address={ADDRESSES['head']}:6379", "--num-cpus=1"]
        if node.name == "head":
            role = ["--head", "--port=6379", "--num-cpus=0", "--include-dashboard=false"]
        return node.command(
            *(sys.executable, "-m", "ray.scripts.scripts", "start", *role, f"--node-ip-address={node.address}"),
            *(f"--temp-dir={self.disk}/ray", f"--object-store-memory={200 << 20}"),
            "--include-log-monitor=false",
        )

    def power_off(self, name: str) -> None:
        """Cut a node's cable, so that nobody hears it end, and end it."""
        node = self.nodes.pop(name)
        self._at_the_bridge("ip", "link", "delete", name)
        end(node.holder)

    def _at_the_bridge(self, *command: str) -> None:
        subprocess.run(["nsenter", f"--target={self.bridge.pid}", "--net", *command], check=True)

    def begin(self, output: Path, workers: str, driver: str = "head", address: str | None = None) -> Any:
        """Begin ``billhook prune`` on the node ``driver``, joined to the cluster if nothing else is said."""
        command = [sys.executable, "-m", "billhook.orchestrator", "prune", f"{self.disk}/model", "-o", str(output)]
        command += ["--calibration", str(self.text), *OPTIONS, "--scratch", f"{self.disk}/scratch", "--json"]
        command += ["--workers", workers, "--address", address or f"{ADDRESSES['head']}:6379"]
        return subprocess.Popen(self.nodes[driver].command(*command), **self._quiet())

    def prune(self, output: Path, workers: str, driver: str = "head", address: str | None = None) -> Ended:
        """Run ``billhook prune`` to its end; see :meth:`begin`."""
        return ended(self.begin(output, workers, driver, address))

    @contextmanager
    def disturbed(
        self, output: Path, workers: str, fault: tuple[str, str, int, str]
    ) -> Iterator[tuple[subprocess.Popen[str], str]]:
        """Begin to prune; return the command and the node's name when the fault happens. What waits goes on at the end.

        fault: role, point, count and action; see the injection.
        """
        marks = Path(tempfile.mkdtemp(dir=self.shared, prefix="marks-"))
        armed = dict(zip(("role", "point", "count", "action"), fault, strict=True))
        file = Path(self.environment["BILLHOOK_FAULT_FILE"])
        file.write_text(json.dumps({"folder": str(marks), "within": [], **armed}))
        process = self.begin(output, workers)
        try:
            yield process, str(wait_until(lambda: happened(process, marks)))
        finally:
            (marks / "go").touch()
            file.unlink()

    def prune_disturbed(
        self, output: Path, workers: str, fault: tuple[str, str, int, str], then: Callable[[str], None]
    ) -> str:
        """Prune; when the fault happens, do ``then`` to the node that it happened on, and return that node's name."""
        with self.disturbed(output, workers, fault) as (process, name):
            then(name)
        done = ended(process)
        assert done.code == 0, done.err
        assert json.loads(done.out)["output"] == str(output), "what Ray has to say is not part of the answer"
        return name

    def contents(self, output: Path, driver: str = "head") -> dict[str, bytes]:
        """Return everything of the output that must not depend on how the run went."""
        seen = self.seen(output, driver)
        files = {path.name: path.read_bytes() for path in seen.iterdir() if path.is_file()}
        return {**files, "manifest": (seen / "billhook" / "manifest.json").read_bytes()}

    def pools(self, output: Path, driver: str = "head") -> list[set[str]]:
        """Return the names of the nodes that each pool of the run had workers on."""
        names = {address: name for name, address in ADDRESSES.items()}
        events = (self.seen(output, driver) / "billhook" / "events.jsonl").read_text().splitlines()
        pools = [event["nodes"] for event in map(json.loads, events) if event["event"] == "workers"]
        return [{names[address] for address in nodes} for nodes in pools]

    def seen(self, path: Path, node: str) -> Path:
        """Return where a path on a node lies outside."""
        return self.nodes[node].disk / path.relative_to(self.disk) if path.is_relative_to(self.disk) else path

    def _quiet(self) -> dict[str, Any]:
        return {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": self.environment}


def holder(*command: str) -> subprocess.Popen[str]:
    """Start what holds namespaces; return once it has them. It ends when this process does."""
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n", f"failed: {command}"
    return process


def end(process: subprocess.Popen[str]) -> None:
    """End what holds namespaces; return once it is gone."""
    process.kill()
    process.communicate()


def ended(process: subprocess.Popen[str]) -> Ended:
    """Wait for a command to end."""
    out, error = process.communicate(timeout=240)
    return Ended(process.returncode, out, error)


def happened(process: subprocess.Popen[str], marks: Path) -> str:
    """Return the name of the node that the fault has happened on; empty before it has."""
    assert process.poll() is None, ended(process).err
    mark = marks / "happened"
    return mark.read_text() if mark.exists() else ""


def why_not() -> str | None:
    """Return why there can be no lab here; None where there can."""
    if os.geteuid() != 0:
        return "only root can make networks"
    missing = [tool for tool in ("ip", "unshare", "nsenter", "mount", "hostname", "ps") if shutil.which(tool) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    attempt = "ip link add bridge type bridge && ip link add one type veth peer name two"
    done = subprocess.run(["unshare", "--net", "sh", "-c", attempt], capture_output=True, text=True, check=False)
    return f"no bridge, or no pair of cables: {done.stderr.strip()}" if done.returncode else None


@pytest.fixture(scope="session")
def possible() -> None:
    """Skip where there can be no lab."""
    if reason := why_not():
        pytest.skip(reason)


@pytest.fixture(scope="session")
def cluster(possible: None, make_model: Callable[..., Path], text_file: Path) -> Iterator[Lab]:
    """The lab, with its head."""
    folder = Path(tempfile.mkdtemp(prefix="lab-", dir="/tmp"))  # short: Ray puts sockets below
    for name in ("disk", "disks", "shared"):
        (folder / name).mkdir()
    path = os.pathsep.join(filter(None, [str(INJECTION), os.environ.get("PYTHONPATH")]))
    ours = {"PYTHONPATH": path, "BILLHOOK_FAULT_FILE": f"{folder}/shared/fault"}
    environment = {**os.environ, **RAY_ENVIRONMENT, "RAY_AUTH_TOKEN": secrets.token_hex(32), **ours}
    bridge = holder("unshare", "--net", "sh", "-c", BRIDGE)
    lab = Lab(folder, text_file, make_model(num_hidden_layers=5), bridge, environment)
    try:
        lab.start("head")
        yield lab
    finally:
        for node in lab.nodes.values():
            end(node.holder)
        end(lab.bridge)
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def expected(cluster: Lab) -> dict[str, bytes]:
    """What one worker makes, on one node, in a Ray session of its own."""
    output = cluster.disk / "expected"
    alone = cluster.prune(output, "1", address="local")
    assert alone.code == 0, alone.err
    return cluster.contents(output)


@pytest.fixture
def lab(cluster: Lab) -> Iterator[Lab]:
    """The lab with all its nodes; nothing may be left of a test's runs."""
    cluster.start(*ADDRESSES)
    yield cluster
    for node in cluster.nodes.values():
        wait_until(lambda node=node: not node.actors())
        assert not list(node.disk.glob("scratch/*"))


def wait_until(holds: Callable[[], Any], seconds: float = 240.0) -> Any:
    """Return what ``holds`` returns, once that is true."""
    until = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < until, "it never came true"
        time.sleep(0.05)
    return found
