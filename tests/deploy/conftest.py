"""Machines for what starts clusters: each has two networks, processes, shared memory, a home, and a daemon.

Without Ray: that is what `ray up` and Slurm are to start there.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

NETWORK = "10.0.0"
OTHER_NETWORK = "10.99.0"
"""A second interface of every machine, which is not the cluster's."""


@dataclass
class Machine:
    """One machine; ``home`` is the home folder of its root user, as seen from outside and inside."""

    name: str
    address: str
    other_address: str
    home: Path
    init: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    def boot(self, daemon: str) -> None:
        """Start the machine's first process, a shell command; all others end with it."""
        inside = f"""
            set -e
            mount --bind {self.home}/passwd /etc/passwd
            mount --bind {self.home}/hosts /etc/hosts
            mount -t tmpfs tmpfs /dev/shm
            mount -t tmpfs tmpfs /run
            mount -t tmpfs tmpfs /opt
            mkdir /run/sshd
            ln -s {sys.prefix} /opt/billhook
            mount --bind {self.home}/ray /tmp/ray
            hostname {self.name}
            touch {self.home}/booted
            {daemon}
        """
        Path("/tmp/ray").mkdir(exist_ok=True)  # only to mount on it
        self.init = subprocess.Popen(
            [
                *("ip", "netns", "exec", self.name, "unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child"),
                *("--mount-proc", "bash", "-c", inside),
            ],
            stdout=(self.home / "boot.log").open("wb"),
            stderr=subprocess.STDOUT,
        )
        while not (self.home / "booted").exists():
            assert self.init.poll() is None, (self.home / "boot.log").read_text()
            time.sleep(0.05)

    def start(self, command: str, **environment: str) -> subprocess.Popen[str]:
        """Start a shell command as the machine's root."""
        assert self.init is not None
        shell = subprocess.run(
            ["pgrep", "-P", str(self.init.pid)], capture_output=True, text=True, check=True
        ).stdout.split()[0]
        clean = {"PATH": f"{Path(sys.executable).parent}:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": str(self.home)}
        return subprocess.Popen(
            ["nsenter", "--target", shell, "--all", "bash", "-c", f"cd; {command}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**clean, **environment},
        )

    def run(self, command: str, timeout_seconds: float = 120, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a shell command as the machine's root, and wait for it."""
        process = self.start(command, **environment)
        try:
            out, err = process.communicate(timeout=timeout_seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    def until(self, command: str, output: str, timeout_seconds: float = 120, **environment: str) -> None:
        """Run a shell command again and again until it prints ``output``."""
        end = time.monotonic() + timeout_seconds
        while (last := self.run(command, **environment)).stdout.strip() != output:
            assert time.monotonic() < end, last
            time.sleep(0.5)

    def halt(self) -> None:
        """End all its processes."""
        if self.init is not None:
            self.init.kill()
            self.init.wait()
            self.init = None


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


@pytest.fixture
def make_machines(tmp_path: Path) -> Iterator[Callable[[int], list[Machine]]]:
    """Return a function that makes machines on one private network, 10.0.0.1 and so on, and on a second one."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    for tool in ("ip", "nsenter", "unshare", "pgrep"):
        if shutil.which(tool) is None:
            pytest.skip(f"needs {tool}")
    mark = f"bh{os.getpid()}"
    machines: list[Machine] = []
    names = [f"{mark}switch"]

    def make(count: int) -> list[Machine]:
        ip("netns", "add", names[0])
        for network in ("a", "b"):
            ip("-n", names[0], "link", "add", "name", f"br{network}", "type", "bridge")
            ip("-n", names[0], "link", "set", f"br{network}", "up")
        for number in range(1, count + 1):
            name = f"{mark}n{number}"
            names.append(name)
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
            for network, prefix in (("a", NETWORK), ("b", OTHER_NETWORK)):
                port = f"port{network}{number}"
                ip("link", "add", "cable", "netns", name, "type", "veth", "peer", "name", port, "netns", names[0])
                ip("-n", name, "link", "set", "cable", "name", f"eth{network}")
                ip("-n", name, "addr", "add", f"{prefix}.{number}/24", "dev", f"eth{network}")
                ip("-n", name, "link", "set", f"eth{network}", "up")
                ip("-n", names[0], "link", "set", port, "master", f"br{network}", "up")
            home = tmp_path / name
            (home / "ray").mkdir(parents=True)
            passwd = Path("/etc/passwd").read_text().splitlines()
            (home / "passwd").write_text(
                "\n".join(f"root:x:0:0:root:{home}:/bin/bash" if line.startswith("root:") else line for line in passwd)
                + "\n"
            )
            (home / "hosts").write_text(
                "127.0.0.1 localhost\n"
                + "".join(f"{NETWORK}.{other} {mark}n{other}\n" for other in range(1, count + 1))
            )
            machines.append(Machine(name, f"{NETWORK}.{number}", f"{OTHER_NETWORK}.{number}", home))
        return machines

    yield make
    for machine in machines:
        machine.halt()
    for name in names:
        subprocess.run(["ip", "netns", "del", name], check=False, stderr=subprocess.DEVNULL)
