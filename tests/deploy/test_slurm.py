"""Our Slurm script in a real Slurm, on two machines made of namespaces."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "cluster" / "deploy" / "slurm.sh"

CONFIGURATION = """
ClusterName=test
SlurmctldHost={head}
SlurmUser=root
AuthInfo=cred_expire=5
StateSaveLocation=/run/slurmctld
SlurmdSpoolDir=/run/slurmd
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=10
{nodes}
PartitionName=all Nodes=ALL Default=YES State=UP
"""

DAEMONS = """
    export SLURM_CONF={folder}/slurm.conf
    mkdir -p /run/munge /run/slurmctld /run/slurmd
    munged --force --key-file={key} --socket=/run/munge/munge.socket.2 --pid-file=/run/munge/pid \
        --log-file={home}/munged.log --seed-file={home}/munge.seed
    if [ {name} = {head} ]; then slurmctld -i; fi
    slurmd -N {name}
    exec sleep infinity
"""

ATTEMPT = """
import ray
from ray._raylet import GcsClient
try:
    GcsClient(address="{address}:6379")
except ray.exceptions.AuthenticationError:
    print("refused")
"""


@pytest.mark.timeout(900)
def test_a_job_that_runs_out_of_time_is_queued_again_and_ends_in_the_same_bytes(
    make_machines: Callable[[int], list[Any]], make_model: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    for tool in ("slurmctld", "slurmd", "sbatch", "munged"):
        if shutil.which(tool) is None:
            pytest.skip(f"needs {tool}")
    model = make_model(num_hidden_layers=10)
    options = f"{model} --method wanda --calibration {text_file} --samples 768 --seqlen 128 --keep-inputs 1"
    machines = make_machines(3)
    head, _, outsider = machines
    key = tmp_path / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    nodes = "\n".join(f"NodeName={node.name} NodeAddr={node.address} CPUs=1" for node in machines[:2])
    (tmp_path / "slurm.conf").write_text(CONFIGURATION.format(head=head.name, folder=tmp_path, nodes=nodes))
    (tmp_path / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    for machine in machines:
        daemons = DAEMONS.format(folder=tmp_path, key=key, home=machine.home, name=machine.name, head=head.name)
        machine.boot(daemons if machine is not outsider else "exec sleep infinity")
    environment = {"SLURM_CONF": f"{tmp_path}/slurm.conf", "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    head.until("sinfo -h -o '%D %T'", "2 idle", 60, **environment)

    submitted = head.run(
        f"cd {tmp_path}; sbatch --parsable --nodes=2 --output={tmp_path}/job.log {SCRIPT} {options} -o out",
        **environment,
    )
    assert submitted.returncode == 0, submitted.stderr
    job = submitted.stdout.strip()
    log = tmp_path / "job.log"

    journal = tmp_path / "out" / "billhook" / "journal.jsonl"
    end = time.monotonic() + 240
    while not journal.exists() or '"kind":"block"' not in journal.read_text():
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.1)
    [token] = tmp_path.glob(".billhook-*/token")
    assert token.stat().st_mode & 0o777 == 0o600
    outside = outsider.run(f"python -c '{ATTEMPT.format(address=head.address)}'")
    assert outside.stdout == "refused\n", outside.stderr

    # What --signal=B:USR1@180 does when the time limit is near.
    assert head.run(f"scancel --batch --signal=USR1 {job}", **environment).returncode == 0
    head.until(f"scontrol show job {job} | grep -o Restarts=1", "Restarts=1", 60, **environment)
    assert not token.exists()
    head.until(f"scontrol show job {job} | grep -o 'JobState=[A-Z]*'", "JobState=COMPLETED", 300, **environment)
    assert "interrupted" in log.read_text().lower()
    assert not list(tmp_path.glob(".billhook-*"))
    assert not list(Path("/tmp").glob(f"billhook-{job}*"))

    again = head.run(f"billhook prune {options} -o {tmp_path}/plain --workers 1", 240, **environment)
    assert again.returncode == 0, again.stderr
    for path in (tmp_path / "plain").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()
    for machine in machines:
        assert machine.run("ps -C raylet -o stat= | grep -v Z").stdout == ""
