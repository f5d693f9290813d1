"""Runs that are gone on with: after an interruption, with other settings, with other libraries."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from outputs import contents
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from steps import ending_at, step_of

from billhook.layerworkers.collective import Alone
from billhook.layerworkers.shards import read_header
from billhook.layerworkers.tasks import Sample
from billhook.layerworkers.worker import BlockWorker
from billhook.orchestrator import InputError, Interrupted, prune, resume, status, verify
from billhook.orchestrator import output as out
from billhook.orchestrator.calibration import calibration_windows
from billhook.orchestrator.events import Event
from billhook.orchestrator.history import read_history
from billhook.orchestrator.interruption import Interruption
from billhook.orchestrator.journal import append, journal_path, read_journal
from billhook.orchestrator.planning import make_plan
from billhook.orchestrator.recipe import read_options
from billhook.orchestrator.request import make_request

pytestmark = pytest.mark.usefixtures("ray_cluster")

CALIBRATION: dict[str, Any] = {"method": "sparsegpt", "samples": 10, "seqlen": 32, "partition_rows": 32, "workers": 1}


def prune_until(blocks: int, model: Path, output: Path, **options: Any) -> None:
    """Prune until so many blocks are committed, and ask the run to end then."""

    with pytest.raises(Interrupted):
        prune(model, output, **ending_at("prune", blocks), **options)


class Steps(list[tuple[str, int]]):
    """Blocks that were replayed and pruned; to be passed as ``progress``."""

    def __call__(self, event: Event) -> None:
        """Note a step."""
        if step_of(event)[0] in ("replay", "prune"):
            self.append(step_of(event))


@pytest.fixture(scope="module")
def llama5(make_model: Any) -> Path:
    folder: Path = make_model(num_hidden_layers=5)
    return folder


@pytest.fixture(scope="module")
def whole(llama5: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Path:
    """What an uninterrupted run writes: treat as read-only."""
    return prune(llama5, tmp_path_factory.mktemp("whole") / "out", calibration=str(text_file), **CALIBRATION).output


@pytest.fixture(scope="module")
def begun(llama5: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Path:
    """A run of which three blocks are done, with the inputs of the fourth kept: to be copied."""
    output = tmp_path_factory.mktemp("begun") / "out"
    prune_until(2, llama5, output, calibration=str(text_file), keep_inputs=1, **CALIBRATION)
    return output


def test_asked_to_end_a_run_commits_the_block_in_progress_and_goes_on_from_kept_inputs(
    llama5: Path, text_file: Path, tmp_path: Path, whole: Path
) -> None:
    output = tmp_path / "out"
    prune_until(2, llama5, output, calibration=str(text_file), keep_inputs=2, **CALIBRATION)
    found = status(output)
    assert (found.state, found.blocks_done, found.blocks) == ("interrupted", 3, 5)
    assert found.seconds_left is not None
    assert found.seconds_left > 0
    assert [path.name for path in (output / "billhook/activations").iterdir()] == ["inputs-00002.safetensors"]
    steps = Steps()
    resumed = resume(output, progress=steps)
    assert steps == [("replay", 3), ("prune", 4), ("prune", 5)]
    assert contents(output) == contents(whole)
    assert not (output / "billhook/activations").exists()
    found = status(output)
    assert (found.state, found.blocks_done, found.last_error) == ("finished", 5, None)
    again = resume(output, ram="1MiB")  # a finished run is finished whatever the budget is now
    assert again.already_finished
    assert again.sparsity == resumed.sparsity


def test_a_block_that_takes_longer_than_the_grace_is_abandoned(llama5: Path, text_file: Path, tmp_path: Path) -> None:
    interruption = Interruption(grace_seconds=0.0)

    def ask(event: Event) -> None:
        if step_of(event) == ("prune", 1):  # the second block is under way
            for actor in workers():
                os.kill(actor, signal.SIGSTOP)
            interruption.ask()

    begin = time.monotonic()
    try:
        with pytest.raises(Interrupted):
            prune(
                llama5,
                tmp_path / "out",
                progress=ask,
                interruption=interruption,
                calibration=str(text_file),
                **CALIBRATION,
            )
    finally:
        for actor in workers():
            os.kill(actor, signal.SIGCONT)
    assert len(read_history(tmp_path / "out").blocks) in (1, 2)  # the second may have been done when they were stopped
    assert time.monotonic() - begin < 120


def workers() -> list[int]:
    from billhook.cluster.session import marked_processes

    commands = {pid: Path(f"/proc/{pid}/cmdline") for pid in marked_processes()}
    return [pid for pid, path in commands.items() if path.exists() and b"WorkerActor" in path.read_bytes()]


def test_without_kept_inputs_everything_committed_is_replayed_over_rubbish(
    llama5: Path, text_file: Path, tmp_path: Path, whole: Path
) -> None:
    """Also: the journal's tail is torn, and the uncommitted tensors are not what they were."""
    output = tmp_path / "out"
    shutil.copytree(whole, output)
    lines = read_journal(output)
    journal_path(output).unlink()
    for line in lines:
        if line["kind"] in ("plan", "start") or line.get("index", 2) < 2:
            append(output, line.pop("kind"), line)
    with journal_path(output).open("ab") as file:
        file.write(b'{"kind":"block","index":2,"li')
    for shard in output.glob("*.safetensors"):
        with safe_open(shard, "pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        for name, tensor in tensors.items():
            if "layers.2." in name:
                tensor.fill_(float("nan"))
        save_file(tensors, shard.with_name(shard.name + ".part"), metadata={"format": "pt"})
        shard.unlink()
    assert status(output).state == "died"
    steps = Steps()
    prune(llama5, output, calibration=str(text_file), progress=steps, keep_inputs="never", **CALIBRATION)
    assert steps == [("replay", 1), ("replay", 2), ("prune", 3), ("prune", 4), ("prune", 5)]
    assert contents(output) == contents(whole)


def test_from_a_block_on_with_other_settings_equals_a_run_that_used_them_there(
    llama5: Path, text_file: Path, tmp_path: Path, whole: Path
) -> None:
    """The reference: workers that are told block by block what each of the two plans says."""
    output, expected = tmp_path / "out", tmp_path / "expected"
    shutil.copytree(whole, output)
    other: dict[str, Any] = {**CALIBRATION, "calibration": str(text_file), "method": "wanda", "sparsity": 0.7}
    steps = Steps()
    branched = prune(llama5, output, from_block=3, progress=steps, **other)
    assert steps == [("replay", 1), ("replay", 2), ("replay", 3), ("prune", 4), ("prune", 5)]
    assert [linear.pattern for linear in branched.linears if ".3." in linear.name] == ["unstructured"] * 7
    assert verify(output).ok
    assert prune(llama5, output, from_block=3, **other).already_finished
    assert prune(llama5, output, **other).already_finished

    first, second = (
        make_request(llama5, read_options(None, each)[0])
        for each in ({"calibration": str(text_file), **CALIBRATION}, other)
    )
    windows = calibration_windows(first.recipe, llama5, first.model.config)
    plans = [make_plan(each, read_options(None, {"workers": 1})[1]) for each in (first, second)]
    expected.mkdir()
    out.create_shards(expected, first.model.checkpoint)
    worker = BlockWorker(first.model.worker_setup(1), Alone())
    worker.start(first.model.layout.stem, [Sample(index, tokens) for index, tokens in enumerate(windows.tokens)])
    for index in range(5):
        worker.prune_block(plans[index >= 3].task(index, expected))
    worker.finish_writing()
    out.copy_tensors(first.model.layout.rest, expected)
    for shard in expected.glob("*.part"):
        assert shard.read_bytes() == (output / shard.name.removesuffix(".part")).read_bytes()


def test_a_branch_takes_no_inputs_that_another_calibration_left(begun: Path, tmp_path: Path) -> None:
    output = shutil.copytree(begun, tmp_path / "out")
    steps = Steps()
    resume(output, from_block=3, progress=steps, seed=1)
    assert steps == [("replay", 1), ("replay", 2), ("replay", 3), ("prune", 4), ("prune", 5)]


def test_another_plan_in_the_same_output_is_refused_and_what_differs_is_named(
    llama5: Path, whole: Path, text_file: Path
) -> None:
    before = contents(whole)
    with pytest.raises(InputError, match=r"recipe\.sparsity: 0\.5 there, 0\.6 asked for.*--from-block"):
        prune(llama5, whole, calibration=str(text_file), sparsity=0.6, **CALIBRATION)
    with pytest.raises(InputError, match=r"blocks 0 to 4 done"):
        prune(llama5, whole, calibration=str(text_file), from_block=6, **CALIBRATION)
    assert contents(whole) == before


def test_a_changed_source_is_refused(llama5: Path, text_file: Path, begun: Path, tmp_path: Path) -> None:
    source = shutil.copytree(llama5, tmp_path / "model")
    output = shutil.copytree(begun, tmp_path / "out")
    shard = next(source.glob("*.safetensors"))
    tensors = load_file(shard)
    for tensor in tensors.values():
        tensor.mul_(1.5)
    save_file(tensors, shard, metadata={"format": "pt"})
    for way in ({}, {"from_block": 1}, {"force": True}):
        with pytest.raises(InputError, match="another source checkpoint, or it was changed"):
            prune(source, output, calibration=str(text_file), **way, **CALIBRATION)  # type: ignore[arg-type]


def test_other_libraries_are_refused_unless_forced(begun: Path, tmp_path: Path) -> None:
    output = shutil.copytree(begun, tmp_path / "out")
    lines = read_journal(output)
    lines[0]["fingerprint"]["versions"]["python"] = "3.5"
    journal_path(output).unlink()
    for line in lines:
        append(output, line.pop("kind"), line)
    with pytest.raises(InputError, match=r"versions\.python: '3\.5' there.*--force.*not byte for byte"):
        resume(output)
    resume(output, force=True)
    assert [each.first_block for each in read_history(output).decided] == [0, 3]
    assert verify(output).ok
    assert resume(output, from_block=3).already_finished


def test_status_tells_a_run_in_progress_and_what_failed_last(llama5: Path, text_file: Path, tmp_path: Path) -> None:
    seen: list[Any] = []

    def look(event: Event) -> None:
        if step_of(event) == ("prune", 2):
            seen.append(status(tmp_path / "out"))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune(llama5, tmp_path / "out", calibration=str(text_file), progress=look, **CALIBRATION)
    (found,) = seen
    assert (found.state, found.blocks_done, found.blocks, found.pid) == ("running", 2, 5, os.getpid())
    found = status(tmp_path / "out")
    assert (found.state, found.last_error, found.method) == ("interrupted", "interrupted", "sparsegpt")


def test_a_request_that_fails_on_resume_removes_nothing(llama5: Path, text_file: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    interruption = Interruption(grace_seconds=0.0)

    def ask(event: Event) -> None:
        if step_of(event)[0] == "start":
            interruption.ask()

    with pytest.raises(Interrupted):
        prune(llama5, output, progress=ask, interruption=interruption, calibration=str(text_file), **CALIBRATION)
    assert status(output).blocks_done == 0
    with pytest.raises(InputError, match="the smallest budget that works"):
        resume(output, ram="1MiB")
    assert read_history(output).decided
    assert status(output).state == "interrupted", "what is refused changes nothing"


def test_a_refused_request_leaves_no_folder(llama5: Path, text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--from-block 3: .* holds no run yet"):
        prune(llama5, tmp_path / "out", calibration=str(text_file), from_block=3, **CALIBRATION)
    assert not (tmp_path / "out").exists()


def test_a_removed_output_is_not_written_to(llama5: Path, text_file: Path, tmp_path: Path) -> None:
    from billhook.layerworkers.errors import RunError

    output = tmp_path / "out"

    def replace(event: Event) -> None:
        if step_of(event) == ("prune", 2):
            output.rename(tmp_path / "gone")
            with out.locked(output):  # somebody begins anew under the same name
                out.create_shards(output, make_request(llama5, read_options(None, {})[0]).model.checkpoint)

    with pytest.raises(RunError, match="was removed or replaced"):
        prune(llama5, output, progress=replace, calibration=str(text_file), **CALIBRATION)
    assert read_journal(output) == []
    for part in output.glob("*.part"):
        _, entries = read_header(part)
        assert not any(part.read_bytes()[entries[0].start_bytes :]), "a worker has written to the new output"


def test_two_drivers_on_one_output(llama5: Path, text_file: Path, tmp_path: Path) -> None:
    refused: list[str] = []

    def second(event: Event) -> None:
        if step_of(event) == ("prune", 1):
            command = [sys.executable, "-m", "billhook.orchestrator", "prune", "--resume", str(tmp_path / "out")]
            done_ = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done_.returncode == 2
            refused.append(done_.stderr)

    prune(llama5, tmp_path / "out", calibration=str(text_file), progress=second, **CALIBRATION)
    assert "another billhook is writing" in refused[0]


def test_workers_of_a_dead_command_are_waited_for(begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from billhook.layerworkers.errors import RunError

    output = shutil.copytree(begun, tmp_path / "out")
    held = os.open(output / "billhook" / out.WORKERS_LOCK, os.O_RDWR)
    fcntl.flock(held, fcntl.LOCK_SH)
    monkeypatch.setattr(out, "ORPHANS_SECONDS", 0.2)
    with pytest.raises(RunError, match="workers of an earlier command still hold it"):
        resume(output)
    threading.Timer(1.0, os.close, [held]).start()
    monkeypatch.setattr(out, "ORPHANS_SECONDS", 30.0)
    resume(output)
