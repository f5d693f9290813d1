"""``ray up`` with our file, over ssh, on three machines made of namespaces."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

DEPLOY = Path(__file__).parents[2] / "cluster" / "deploy"

SSHD = """exec /usr/sbin/sshd -D -e -f /dev/null -h {home}/.ssh/host -o AuthorizedKeysFile={home}/.ssh/billhook.pub \
    -o StrictModes=no -o UsePAM=no -o PasswordAuthentication=no -o PidFile=none -o Subsystem='sftp internal-sftp' \
    -o PermitRootLogin=prohibit-password -o ListenAddress={address} -o MaxStartups=100"""

JOIN = """python -c '
import ray
ray.init(address="10.0.0.1:6379", log_to_driver=False)
print(len([node for node in ray.nodes() if node["Alive"]]), ray.get(ray.remote(lambda: 6 * 7).remote()))
'"""


@pytest.mark.timeout(600)
def test_ray_up_starts_a_cluster_that_only_the_token_opens(
    make_machines: Callable[[int], list[Any]], tmp_path: Path
) -> None:
    for tool in ("/usr/sbin/sshd", "ssh-keygen", "rsync", "nft"):
        if shutil.which(tool) is None:
            pytest.skip(f"needs {tool}")
    machines = make_machines(4)
    head, worker, last, desk = machines
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "key"], check=True)
    for machine in machines:
        ssh = machine.home / ".ssh"
        ssh.mkdir(mode=0o700)
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", ssh / "host"], check=True)
        shutil.copy(tmp_path / "key.pub", ssh / "billhook.pub")
        (machine.home / ".bashrc").write_text("export PATH=/opt/billhook/bin:$PATH\n")
        machine.boot(SSHD.format(home=machine.home, address=machine.address))
    shutil.copy(tmp_path / "key", desk.home / ".ssh" / "billhook")
    config: dict[str, Any] = yaml.safe_load((DEPLOY / "ray-cluster.yaml").read_text())
    config["auth"]["ssh_user"] = "root"
    (desk.home / "cluster.yaml").write_text(yaml.safe_dump(config))
    for machine in machines[:3]:
        desk.until(f"(</dev/tcp/{machine.address}/22) && echo up", "up", 20)

    made = desk.run("umask 077; ray get-auth-token --generate > /dev/null")
    assert made.returncode == 0, made.stderr
    token = desk.home / ".ray" / "auth_token"
    assert token.stat().st_mode & 0o777 == 0o600

    up = desk.run("ray up --yes --no-config-cache cluster.yaml", timeout_seconds=300, RAY_AUTH_MODE="token")
    assert up.returncode == 0, up.stdout + up.stderr
    copy = head.home / ".ray" / "auth_token"
    assert copy.read_text() == token.read_text()
    assert copy.stat().st_mode & 0o777 == 0o600

    head.until(JOIN, "3 42", RAY_AUTH_MODE="token")

    for who in (head, worker, desk):
        for environment in ({}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}):
            refused = who.run(JOIN, **environment, RAY_NUM_REDIS_GET_RETRIES="2")
            assert refused.returncode != 0
            assert refused.stdout == ""

    for machine in (head, worker):
        reach = f"timeout 3 bash -c '</dev/tcp/{machine.other_address}/6380'"
        assert desk.run(reach).returncode == 0
        (machine.home / "ports.nft").write_text((DEPLOY / "private-ports.nft").read_text())
        assert machine.run("nft -f ports.nft && nft -f ports.nft").returncode == 0  # it may be loaded again
        assert desk.run(reach).returncode != 0
    head.until(JOIN, "3 42", RAY_AUTH_MODE="token")

    down = desk.run("ray down --yes cluster.yaml", timeout_seconds=120, RAY_AUTH_MODE="token")
    assert down.returncode == 0, down.stdout + down.stderr
    for machine in (head, worker, last):  # the head ends at once, the others when they have missed it for a while
        machine.until("ps -C raylet -o stat= | grep -vc Z", "0", 180)
