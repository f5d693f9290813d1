"""What a run tells: every line of its log, its documentation, the displays that read it, the tools it is passed to."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pty
import select
import signal
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import pytest
from steps import step_of

from billhook.cluster.session import marked_processes
from billhook.layerworkers.tasks import LinearReport
from billhook.orchestrator import InputError, PruneResult, plan, prune, status
from billhook.orchestrator.event_log import events_page, log, log_path, parse, read_events
from billhook.orchestrator.events import (
    Beat,
    BlockDone,
    BlockLost,
    Event,
    LoggedEvent,
    RunBegun,
    RunFinished,
    Step,
    Warned,
    WorkersStarted,
    errors_by_kind,
)
from billhook.orchestrator.metrics import metrics_logged, metrics_of
from billhook.orchestrator.planning import estimate
from billhook.orchestrator.run_facts import RunFacts, facts_of, followed
from billhook.orchestrator.run_page import run_page

KINDS: tuple[type[Any], ...] = typing.get_args(LoggedEvent)


@dataclasses.dataclass(frozen=True)
class Told:
    """A run that was ended after its first block, lost a worker in its second, and was finished."""

    result: PruneResult
    events: list[Event]
    """As they came to the callback of the command that finished it."""


@pytest.fixture(scope="module")
def told(llama: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Told:
    output = tmp_path_factory.mktemp("told") / "out"
    options: dict[str, Any] = {"calibration": str(text_file), "samples": 8, "seqlen": 32, "workers": 1}
    events: list[Event] = []

    def end(event: Event) -> None:
        if step_of(event) == ("prune", 1):
            raise KeyboardInterrupt

    def kill(event: Event) -> None:
        if step_of(event) == ("replay", 1) and not any(isinstance(each, BlockLost) for each in events):
            for pid in marked_processes():
                if b"WorkerActor" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, signal.SIGKILL)
        events.append(event)

    with pytest.raises(KeyboardInterrupt):
        prune(llama, output, progress=end, keep_inputs="never", **options)
    log_path(output).write_bytes(log_path(output).read_bytes() + b'{"time": 1.0, "event": "blo')  # as a crash leaves it
    result = prune(llama, output, progress=kill, keep_inputs="never", log_to="tensorboard", **options)
    return Told(result, events)


def test_every_line_of_a_run_is_of_the_schema_and_every_kind_and_key_occurs(told: Told) -> None:
    *_, torn = [line for line in log_path(told.result.output).read_bytes().splitlines() if line.endswith(b'"blo')]
    lines = log_path(told.result.output).read_bytes().splitlines()
    logged = [parse(line) for line in lines if line != torn]
    assert {type(line.event) for line in logged} == set(KINDS)
    assert read_events(told.result.output) == logged
    for line in logged:
        assert json.loads(json.dumps(dataclasses.asdict(line.event)))["event"] == line.event.event
    written = [json.loads(line) for line in lines if line != torn]
    for kind in KINDS:
        keys = {"time", *(field.name for field in dataclasses.fields(kind))}
        assert all(set(line) == keys for line in written if line["event"] == kind.event)
    for line in (line for line in written if line["event"] == "block"):
        assert all(set(each) == {field.name for field in dataclasses.fields(LinearReport)} for each in line["linears"])


def test_the_documentation_is_that_of_the_code() -> None:
    page = Path(__file__).parents[2] / "docs" / "events.md"
    assert page.read_text() == events_page(), "python -m billhook.orchestrator.event_log > docs/events.md"


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"[]",
        b'{"event": "lost", "index": 1, "blocks": 3, "tries": 1, "message": ""}',
        b'{"time": 1.0, "event": "nonesuch"}',
        b'{"time": 1.0, "event": "warning"}',
        b'{"time": 1.0, "event": "warning", "message": "", "more": 1}',
    ],
)
def test_what_is_not_of_the_schema_is_no_event(line: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - JSON's, ours or pydantic's
        parse(line)


def test_the_begin_tells_what_the_plan_says_and_blocks_what_came_of_it(
    told: Told, llama: Path, text_file: Path
) -> None:
    begun = next(event for event in told.events if isinstance(event, RunBegun))
    made = plan(llama, calibration=str(text_file), samples=8, seqlen=32, workers=1, keep_inputs="never")
    assert begun.planned_peak_bytes["disk"] == estimate(made).peak_bytes["disk"]
    assert begun.planned_peak_bytes == told.result.planned_bytes
    assert told.result.budgets is not None
    assert begun.budget_bytes["ram"] == told.result.budgets.ram
    assert begun.planned_moved_bytes == tuple(time.moved_bytes for time in made.times)
    assert (begun.blocks, begun.blocks_done, begun.linears) == (3, 1, 21)
    blocks = [event for event in told.events if isinstance(event, BlockDone)]
    assert [block.index for block in blocks] == [1, 2]
    for block in blocks:
        assert block.tokens == 8 * 32
        assert block.worker_seconds == (block.seconds,)
        assert (
            block.written_bytes
            == block.read_bytes
            == sum(each.entry.size_bytes for each in made.request.model.layout.blocks[block.index].tensors)
        )
        assert set(block.peak_bytes) == {"vram", "ram", "disk"}
    assert told.result.linears[7:] == tuple(linear for block in blocks for linear in block.linears)
    finished = told.events[-1]
    assert isinstance(finished, RunFinished)
    assert (finished.sparsity, finished.peak_bytes) == (told.result.sparsity, told.result.peak_bytes)
    assert any(isinstance(event, Warned) and "tiny calibration" in event.message for event in told.events)


def test_tensorboard_reads_what_was_logged(told: Told) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(told.result.output / "billhook" / "tensorboard")).Reload()
    blocks = [event for event in told.events if isinstance(event, BlockDone)]
    for name in ("error/mlp.down_proj", "block/largest_error", "seconds/forward", "block/blocks_per_hour"):
        expected = [metrics_of(block)[0][name] for block in blocks]
        scalars = found.Scalars(name)
        assert [scalar.step for scalar in scalars] == [1, 2]
        assert [scalar.value for scalar in scalars] == pytest.approx(expected, rel=1e-6)
    assert found.Scalars("run/sparsity")[0].value == pytest.approx(told.result.sparsity)


def test_a_tool_that_fails_is_told_no_more_and_ends_no_run(
    told: Told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.utils.tensorboard import SummaryWriter

    def fail(*_: object) -> None:
        raise OSError("no room")

    block = next(event for event in told.events if isinstance(event, BlockDone))
    warned: list[Event] = []
    with metrics_logged(["tensorboard"], tmp_path, {}, warned.append) as listen:
        monkeypatch.setattr(SummaryWriter, "add_scalar", fail)
        listen(block)
        listen(block)
    assert [str(event) for event in warned] == ["warning: --log-to tensorboard: failed and is told no more: no room"]


def test_a_tool_that_is_not_there_is_refused_with_what_to_install(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("billhook.orchestrator.metrics.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"--log-to wandb: .* pip install wandb"):
        prune(llama, tmp_path / "out", method="magnitude", log_to="wandb")
    with pytest.raises(InputError, match=r"option log_to.*'trackio'"):
        prune(llama, tmp_path / "out", method="magnitude", log_to="tensorboard,nonesuch")
    assert not (tmp_path / "out").exists()


def test_the_dashboard_is_there_on_request_or_refused_with_what_to_install(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"option dashboard: expected no --address"):
        plan(llama, method="magnitude", dashboard=True, address="10.0.0.1:6379")
    assert estimate(plan(llama, method="magnitude", dashboard=True)).peak_bytes["ram"] > estimate(
        plan(llama, method="magnitude")
    ).peak_bytes["ram"] + (500 << 20)
    with contextlib.suppress(ImportError):
        import ray.dashboard.optional_deps  # noqa: F401

        pytest.skip("Ray's dashboard is installed here")
    with pytest.raises(InputError, match=r"--dashboard: .*pip install 'ray\[default\]'"):
        prune(llama, tmp_path / "out", method="magnitude", dashboard=True)
    assert not (tmp_path / "out").exists()


def test_status_tells_from_files_what_the_display_tells(told: Told) -> None:
    live = RunFacts()
    for event in told.events:
        live = followed(live, event, 0.0)
    stored = facts_of(read_events(told.result.output))
    assert dataclasses.replace(stored, since=0.0, workers=(), silent_seconds=()) == live
    found = status(told.result.output)
    assert (found.peak_bytes, found.planned_peak_bytes) == (live.peak_bytes, live.planned_peak_bytes)
    assert (found.budget_bytes, found.errors, found.lost) == (live.budget_bytes, live.errors, 1)
    assert (found.state, found.doing) == ("finished", None)


LINEAR = LinearReport("model.layers.0.mlp.experts.3.w1.weight", (2, 4), "2:4", "wanda", 4, 4, 0.25, ())


def test_facts_follow_a_run_from_its_begin_to_its_end(told: Told) -> None:
    begun = next(event for event in told.events if isinstance(event, RunBegun))
    done = next(event for event in told.events if isinstance(event, BlockDone))
    facts = followed(RunFacts(), dataclasses.replace(begun, planned_block_seconds=(10.0, 20.0, 40.0)), 5.0)
    assert (facts.done, facts.seconds_left) == (1, 60.0)
    facts = followed(facts, WorkersStarted(1, ("10.0.0.1",), ("one",)), 6.0)
    facts = followed(facts, Step("replay", 1, 3, ""), 7.0)
    assert facts.doing == "pruning block 2 of 3"
    facts = followed(facts, Beat(("solving",), (9.0,), 7 << 30), 8.0)
    page = run_page(facts, 11.0).plain
    assert "pruning block 2 of 3 for 4 s" in page
    assert "0 solving, 0 silent for 9 s" in page
    assert "7.00 GiB of" in page
    facts = followed(facts, dataclasses.replace(done, seconds=3.0, linears=(LINEAR,)), 12.0)
    page = run_page(facts, 13.0).plain
    assert "2 of 3, 3 s each, about 2 s left" in page
    assert "mlp.experts.*.w1 0.2500" in page
    assert facts.workers == ("solving",)
    facts = followed(facts, dataclasses.replace(done, index=2), 14.0)
    assert (facts.doing, facts.workers) == ("finishing", ())


def test_errors_of_all_experts_of_a_kind_are_one() -> None:
    stacked = [dataclasses.replace(LINEAR, name=f"model.layers.7.mlp.experts.down[{n}]", error=n) for n in (1, 3)]
    named = [dataclasses.replace(LINEAR, name=f"transformer.h.7.attn.{n}.c_attn.weight", error=n) for n in (1, 5)]
    assert errors_by_kind([*stacked, *named]) == {"mlp.experts.down": 2.0, "attn.*.c_attn": 3.0}


def test_beats_are_not_logged_and_a_log_that_cannot_be_written_ends_no_run(tmp_path: Path) -> None:
    (tmp_path / "billhook").mkdir()
    log(tmp_path, Beat(("idle",), (0.0,), 1))
    assert not log_path(tmp_path).exists()
    log(tmp_path / "gone", Warned("x"))
    assert read_events(tmp_path / "gone") == []


SHOWN = """
import sys
from pathlib import Path
from billhook.orchestrator.event_log import read_events
from billhook.orchestrator.progress import shown_progress
with shown_progress() as progress:
    for line in read_events(Path(sys.argv[1])):
        progress(line.event)
print("the command's own output")
"""


def test_a_terminal_shows_a_live_page_and_a_file_plain_lines(told: Told) -> None:
    command = [sys.executable, "-c", SHOWN, str(told.result.output)]
    plain = subprocess.run(command, capture_output=True, text=True, check=True)
    assert plain.stdout == "the command's own output\n"
    assert "\x1b" not in plain.stderr
    lines = plain.stderr.splitlines()
    assert len(lines) == len(read_events(told.result.output)) + sum(line.startswith(" ") for line in lines)
    assert any("pruning block 3 of 3: sparsity 0.5" in line for line in lines)
    terminal, end = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "200"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=end, text=True, env=environment) as live:
        os.close(end)
        shown = b""
        with contextlib.suppress(OSError):  # the other end is closed
            while select.select([terminal], [], [], 30)[0] and (more := os.read(terminal, 1 << 16)):
                shown += more
        assert live.stdout is not None
        assert live.stdout.read() == "the command's own output\n"
    os.close(terminal)
    text = shown.decode()
    assert "\x1b[" in text
    for part in ("pruning block 3 of 3", "RAM", "planned", "errors", "in the last block"):
        assert part in text
