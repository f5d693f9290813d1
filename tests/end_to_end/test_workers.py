"""Whatever the number of workers, and whatever becomes of them: the same bytes."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from steps import step_of

from billhook.cluster import pool
from billhook.cluster.placement import Share, reserve
from billhook.cluster.scribe import Scribe
from billhook.cluster.session import marked_processes
from billhook.orchestrator import RunError, prune, status
from billhook.orchestrator import output as out
from billhook.orchestrator.calibration import calibration_windows, deal_samples
from billhook.orchestrator.events import Event, Progress, sparsity_of
from billhook.orchestrator.journal import read_journal
from billhook.orchestrator.model import open_model
from billhook.orchestrator.planning import make_plan, with_workers
from billhook.orchestrator.recipe import read_options
from billhook.orchestrator.request import make_request

pytestmark = pytest.mark.usefixtures("ray_cluster")

CALIBRATION: dict[str, Any] = {"method": "sparsegpt", "samples": 18, "seqlen": 32, "partition_rows": 32}
"""Five partitions of four samples, the last one short; several row partitions in every linear."""


def contents(output: Path) -> dict[str, bytes]:
    """Everything that must not depend on how a run went."""
    files = {path.name: path.read_bytes() for path in output.iterdir() if path.is_file()}
    return {**files, "manifest": (output / "billhook" / "manifest.json").read_bytes()}


def worker_processes() -> list[int]:
    commands = {pid: Path(f"/proc/{pid}/cmdline") for pid in marked_processes()}
    return [pid for pid, path in commands.items() if path.exists() and b"WorkerActor" in path.read_bytes()]


def pools(output: Path) -> list[int]:
    """Return how many workers each pool of a run had."""
    events = map(json.loads, (output / "billhook" / "events.jsonl").read_text().splitlines())
    return [len(event["nodes"]) for event in events if event["event"] == "workers"]


def once(phase: str, done: int, act: Callable[[], None]) -> Progress:
    """Return a progress callback that acts the first time that a step is done."""
    left = [act]

    def progress(event: Event) -> None:
        if step_of(event) == (phase, done) and left:
            left.pop()()

    return progress


@pytest.fixture(scope="module")
def whole(llama: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Path:
    """What one worker makes of it: treat as read-only."""
    output = tmp_path_factory.mktemp("whole") / "out"
    return prune(llama, output, calibration=str(text_file), workers=1, **CALIBRATION).output


@pytest.mark.thorough
def test_one_to_four_workers_give_the_same_bytes_for_every_method_and_pattern(
    make_model: Any, text_file: Path, tmp_path: Path
) -> None:
    """One pool for each number of workers, which does one recipe after the other."""
    llama = make_model(num_hidden_layers=2)
    plans, written = {}, dict[int, dict[str, bytes]]()
    for method, pattern in itertools.product(["wanda", "sparsegpt", "admm"], ["unstructured", "2:4"]):
        options: Any = {**CALIBRATION, "method": method, "pattern": pattern, "calibration": str(text_file)}
        recipe, resources = read_options(None, {**options, "workers": 1})
        plans[method, pattern] = make_plan(make_request(llama, recipe), resources)
    model = plans["wanda", "2:4"].request.model
    windows = calibration_windows(plans["wanda", "2:4"].request.recipe, llama, model.config)
    for workers in (1, 2, 3, 4):
        written[workers] = {}
        places = reserve(workers, workers, Share(1, 0), 60.0)
        setup = open_model(llama, "cpu", "auto", False).worker_setup(1)
        with pool.WorkerPool(setup, places) as running:
            for (method, pattern), alone in plans.items():
                plan = with_workers(alone, workers)
                output = tmp_path / f"{workers}-{method}-{pattern}"
                output.mkdir()
                out.create_shards(output, model.checkpoint)
                running.start(model.layout.stem, deal_samples(windows, plan.request.recipe.partition_samples, workers))
                done = list(running.prune_blocks(plan.task(block.index, output) for block in model.layout.blocks))
                assert sparsity_of(done[0].linears) == pytest.approx(0.5, abs=0.01)
                for shard in output.glob("*.part"):
                    written[workers][f"{method} {pattern} {shard.name}"] = shard.read_bytes()
    assert len(written[1]) == len(plans) * len(list(llama.glob("*.safetensors")))
    assert written[1] == written[2] == written[3] == written[4]


@pytest.mark.parametrize("what", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.thorough)])
def test_a_worker_that_dies_or_hangs_is_replaced(
    llama: Path, text_file: Path, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, what: signal.Signals
) -> None:
    monkeypatch.setattr(pool, "SILENT_SECONDS", 6.0)
    output = tmp_path / "out"
    hit = once("prune", 1, lambda: os.kill(worker_processes()[0], what))
    prune(llama, output, calibration=str(text_file), workers=2, progress=hit, **CALIBRATION)
    assert contents(output) == contents(whole)
    (lost,) = (line for line in read_journal(output) if line["kind"] == "lost")
    assert lost["index"] in (1, 2)
    assert ("died" if what == signal.SIGKILL else "was not heard of for 6 s") in lost["message"]
    assert pools(output) == [2, 2]
    end = time.monotonic() + 30  # Ray ends what is frozen in its own time
    while worker_processes() and time.monotonic() < end:
        time.sleep(0.1)
    assert not worker_processes()


@pytest.mark.thorough
def test_a_pass_for_gradients_that_loses_a_worker_begins_again(llama: Path, text_file: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {**CALIBRATION, "method": "gblm", "calibration": str(text_file)}
    events: list[Event] = []
    hit = once("gradients", 4, lambda: os.kill(worker_processes()[0], signal.SIGKILL))

    def heard(event: Event) -> None:
        events.append(event)
        hit(event)

    prune(llama, tmp_path / "out", workers=2, progress=heard, **options)
    assert [step_of(event) for event in events].count(("gradients", 1)) == 2
    assert any("the pass for gradients begins again: worker" in str(event) for event in events)
    prune(llama, tmp_path / "whole", workers=1, **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_block_that_is_lost_three_times_ends_the_run_and_can_be_gone_on_with(
    llama: Path, text_file: Path, tmp_path: Path, whole: Path
) -> None:
    output = tmp_path / "out"

    def kill(event: Event) -> None:
        if step_of(event) in (("replay", 1), ("prune", 1)):
            os.kill(worker_processes()[0], signal.SIGKILL)

    options: dict[str, Any] = {"calibration": str(text_file), "workers": 1, "keep_inputs": "never", **CALIBRATION}
    with pytest.raises(
        RunError, match=r"block [12] failed 3 times, the last time so: worker 0 \(process \d+ on .* died"
    ):
        prune(llama, output, progress=kill, **options)
    found = status(output)
    assert found.state == "failed"
    assert prune(llama, output, **options).output == output
    assert contents(output) == contents(whole)


@pytest.mark.thorough
def test_workers_are_used_as_soon_as_there_is_room(
    make_model: Any, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from billhook.orchestrator import block_loop

    monkeypatch.setattr(block_loop, "PATIENCE_SECONDS", 1.0)
    model, output = make_model(num_hidden_layers=5), tmp_path / "out"
    options: dict[str, Any] = {"calibration": str(text_file), **CALIBRATION}
    alone = prune(model, tmp_path / "alone", workers=1, **options).output

    @ray.remote(num_cpus=3)
    class Other:
        pass

    other = Other.remote()
    ray.get(other.__ray_ready__.remote())

    def leave() -> None:
        ray.kill(other)
        end = time.monotonic() + 30
        while ray.available_resources().get("CPU", 0) < 3 and time.monotonic() < end:
            time.sleep(0.1)

    prune(model, output, workers=3, progress=once("prune", 1, leave), **options)
    assert pools(output) == [1, 3]
    assert contents(output) == contents(alone)


def scribe_that_sees(**options: Any) -> Any:
    """What starts a scribe for the true output, where workers were told of another."""
    start = Scribe.options(**options).remote  # type: ignore[attr-defined]
    sees = lambda access: dataclasses.replace(access, proof=Path(access.lock).read_text())  # noqa: E731
    return SimpleNamespace(remote=lambda access, workers: start(sees(access), workers))


def test_workers_that_do_not_see_the_output_write_it_through_the_drivers_node(
    make_model: Any, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also: what was written is read again, when a worker is lost, from kept inputs on."""
    begin = out.begin_access
    unseen = lambda output: dataclasses.replace(begin(output), proof="of another machine")  # noqa: E731
    model, output = make_model(num_hidden_layers=4), tmp_path / "out"
    options: dict[str, Any] = {"calibration": str(text_file), "keep_inputs": 2, "activations": "disk", **CALIBRATION}
    alone = prune(model, tmp_path / "alone", workers=1, **options).output
    monkeypatch.setattr(out, "begin_access", unseen)
    monkeypatch.setattr(pool, "Scribe", SimpleNamespace(options=scribe_that_sees))
    steps: list[tuple[str, int]] = []
    hit = once("prune", 3, lambda: os.kill(worker_processes()[0], signal.SIGKILL))

    def progress(event: Event) -> None:
        steps.append(step_of(event))
        hit(event)

    prune(model, output, workers=2, progress=progress, **options)
    assert contents(output) == contents(alone)
    assert ("replay", 3) in steps
    assert ("replay", 2) not in steps
