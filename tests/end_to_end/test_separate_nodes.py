"""Ray nodes that are separate on one machine (`ray.cluster_utils.Cluster`); see also ``make test-nodes``."""

from __future__ import annotations

import json
import os
import re
import secrets
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from billhook.orchestrator import prune

CLUSTER = """
import sys
from ray.cluster_utils import Cluster
small = {"object_store_memory": 90 << 20, "include_dashboard": False}
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **small})
nodes = [cluster.add_node(num_cpus=1, **small) for _ in range(2)]
print(cluster.address, flush=True)
for line in sys.stdin:
    cluster.remove_node(nodes[int(line)], allow_graceful=False)
cluster.shutdown()
"""
"""A head without a CPU to compute with, and two nodes of one each; a number that is written to it ends that node."""


@dataclass(frozen=True)
class Nodes:
    process: subprocess.Popen[str]
    address: str
    environment: dict[str, str]

    def end(self, node: int) -> None:
        assert self.process.stdin is not None
        print(node, file=self.process.stdin, flush=True)


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",  # else whatever the machine does beside comes first
    }
    command = [sys.executable, "-c", CLUSTER]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment, text=True) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        while ":" not in (line := process.stdout.readline().strip()) or " " in line:
            assert process.poll() is None
        yield Nodes(process, line, environment)
        process.stdin.close()


@pytest.mark.thorough
def test_two_nodes_and_then_one_make_the_same_bytes(
    make_model: Any, text_file: Path, tmp_path: Path, nodes: Nodes, ray_cluster: None
) -> None:
    """A node is lost on the way: the run goes on with the one that is left."""
    model, output = make_model(num_hidden_layers=5), tmp_path / "out"
    options: dict[str, Any] = {"samples": 200, "seqlen": 64, "calibration": str(text_file)}
    arguments = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "billhook.orchestrator", "prune", str(model), "-o", str(output), *arguments]
    command += ["--address", nodes.address, "--json"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=nodes.environment) as process:
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if "pruning block 1" in line:
                nodes.end(0)
        assert process.stdout is not None
        document = process.stdout.read()
    assert process.returncode == 0, "".join(lines)
    assert any(re.search(r": 2 of \d+ worker\(s\): 2 on ", line) for line in lines), "both on this machine's address"
    assert json.loads(document)["output"] == str(output), "and nothing else is on standard output"
    events = map(json.loads, (output / "billhook/events.jsonl").read_text().splitlines())
    assert [len(event["nodes"]) for event in events if event["event"] == "workers"] == [2, 1]
    alone = prune(model, tmp_path / "alone", workers=1, **options).output
    for file in [*(path.name for path in alone.iterdir() if path.is_file()), "billhook/manifest.json"]:
        assert (output / file).read_bytes() == (alone / file).read_bytes()
