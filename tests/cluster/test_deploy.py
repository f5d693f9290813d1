"""The deployment files: Ray and our command line understand them, and what they start lets in the token's owners alone.

A head is started here with the file's own command, on the loopback interface; `ray up` and Slurm themselves are tried
in ``tests/deploy``.
"""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from billhook.cluster import session

DEPLOY = Path(__file__).parents[2] / "cluster" / "deploy"

MAKE_TOKEN = "umask 077; ray get-auth-token --generate > /dev/null"

JOIN = """
import os, ray
from ray._raylet import GcsClient
try:
    GcsClient(address=os.environ["GCS"])
except ray.exceptions.AuthenticationError:
    print("refused")
ray.init(address=os.environ["GCS"], log_to_driver=False)
print(ray.get(ray.remote(lambda: 6 * 7).remote()))
"""


@dataclass(frozen=True)
class Head:
    """A running head, and how its user joins it."""

    address: str
    home: Path
    environment: dict[str, str]
    """Of a process without the token."""

    @property
    def admitted(self) -> dict[str, str]:
        """The environment of a process with the token."""
        return {**self.environment, "RAY_AUTH_MODE": "token", "HOME": str(self.home)}


def read(name: str) -> list[Any]:
    return list(yaml.safe_load_all((DEPLOY / name).read_text()))


def clean_environment(home: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    tools = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HOME": str(home)}
    return {**kept, **tools, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_NUM_REDIS_GET_RETRIES": "1"}


def head_command(first_port: int) -> str:
    """The file's command, for the loopback interface, on other ports, and without machines to start over ssh."""
    command = read("ray-cluster.yaml")[0]["head_start_ray_commands"][-1]
    command = command.replace("10.0.0.1", "127.0.0.1").replace("--autoscaling-config=~/ray_bootstrap_config.yaml", "")
    moved = re.sub(r"(port=)(6\d\d\d)", lambda found: f"{found[1]}{int(found[2]) - 6379 + first_port}", command)
    return f"{moved} --num-cpus=1 --object-store-memory=100000000"


def shell(command: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", command], env=environment, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    home, stranger = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("stranger")
    folder = Path(tempfile.mkdtemp(prefix="bhd-", dir="/tmp"))  # short: Ray's sockets are in it
    environment = {**clean_environment(home), "RAY_TMPDIR": str(folder), session.SESSION_VARIABLE: str(folder)}
    made = shell(MAKE_TOKEN, environment)
    assert made.returncode == 0, made.stderr
    first_port = random.randrange(20_000, 30_000)
    try:
        started = shell(head_command(first_port), environment)
        assert started.returncode == 0, started.stdout + started.stderr
        yield Head(f"127.0.0.1:{first_port}", home, {**clean_environment(stranger), "GCS": f"127.0.0.1:{first_port}"})
    finally:
        session._remove(folder)


def test_ray_accepts_the_file_for_ray_up() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    [config] = read("ray-cluster.yaml")
    validate_config(prepare_config(config))
    for kind in ("head", "worker"):
        assert "RAY_AUTH_MODE=token" in config[f"{kind}_start_ray_commands"][-1]
    assert "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][-1]
    assert list(config["file_mounts"]) == ["~/.ray/auth_token"]


def test_the_firewall_covers_every_port_that_the_files_give_to_ray() -> None:
    rule = re.search(r"tcp dport \{ (.*) \} drop", (DEPLOY / "private-ports.nft").read_text())
    assert rule is not None
    closed: set[int] = set()
    for part in rule[1].split(", "):
        first, _, last = part.partition("-")
        closed.update(range(int(first), int(last or first) + 1))
    for name in ("ray-cluster.yaml", "slurm.sh"):
        ports = [int(port) for port in re.findall(r"port=(\d+)", (DEPLOY / name).read_text())]
        assert len(ports) >= 9
        assert closed.issuperset(ports)


def test_the_job_for_kuberay_asks_for_a_token() -> None:
    [claim] = read("volume.yaml")
    policy, job = read("rayjob.yaml")
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        [container] = group["template"]["spec"]["containers"]
        assert {"name": "RAY_AUTH_MODE", "value": "token"} in container["env"]
        [volume] = group["template"]["spec"]["volumes"]
        assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        assert policy["spec"]["podSelector"]["matchLabels"].items() <= group["template"]["metadata"]["labels"].items()


def test_the_commands_in_the_files_have_options_that_exist() -> None:
    import typer

    from billhook.orchestrator.cli import app

    command: Any = typer.main.get_command(app)
    known = {option for parameter in command.commands["prune"].params for option in parameter.opts}
    entrypoint = read("rayjob.yaml")[1]["spec"]["entrypoint"]
    [line] = re.findall(r"^billhook prune (.*)", (DEPLOY / "slurm.sh").read_text(), re.MULTILINE)
    page = (DEPLOY.parents[1] / "docs" / "cluster.md").read_text().replace("\\\n", " ")
    shown = re.findall(r"^ +.*(?:billhook prune|slurm.sh) (MODEL .*)", page, re.MULTILINE)
    assert len(shown) == 4
    for text in (entrypoint, line, *shown):
        used = re.findall(r"(?<!\S)(--?[a-z-]+)", text)
        assert used
        assert known.issuperset(used)
        assert "--calibration" in used or text == line, "the default method needs it"


def test_the_slurm_script_is_a_script() -> None:
    assert shell(f"bash -n {DEPLOY / 'slurm.sh'}", dict(os.environ)).returncode == 0


def test_without_a_token_nothing_starts(tmp_path: Path) -> None:
    (tmp_path / "ray").mkdir()
    environment = {**clean_environment(tmp_path), "RAY_TMPDIR": str(tmp_path / "ray")}
    started = shell(head_command(random.randrange(20_000, 30_000)), environment)
    assert started.returncode != 0
    assert "token" in started.stdout + started.stderr
    assert not list((tmp_path / "ray").rglob("sockets/*"))


def test_the_token_opens_the_cluster_and_nobody_else_can_read_it(head: Head) -> None:
    assert (head.home / ".ray" / "auth_token").stat().st_mode & 0o777 == 0o600
    joined = subprocess.run([sys.executable, "-c", JOIN], env=head.admitted, capture_output=True, text=True, check=True)
    assert joined.stdout == "42\n"


@pytest.mark.parametrize("token", [{}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}], ids=["none", "wrong"])
def test_without_the_token_no_work_is_taken(head: Head, token: dict[str, str]) -> None:
    environment = {**head.environment, **token}
    joined = subprocess.run(
        [sys.executable, "-c", JOIN], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert joined.returncode != 0
    assert joined.stdout == "refused\n"


def test_the_command_line_says_what_a_refused_token_means(head: Head, llama: Path, tmp_path: Path) -> None:
    run = subprocess.run(
        [
            *(sys.executable, "-m", "billhook.orchestrator", "prune", str(llama), "-o", str(tmp_path / "out")),
            *("--method", "magnitude", "--address", head.address, "--workers", "1"),
        ],
        env=head.environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.returncode == 2, run.stderr
    assert f"--address {head.address}" in run.stderr
    assert "RAY_AUTH_MODE=token" in run.stderr
    assert not (tmp_path / "out").exists()
