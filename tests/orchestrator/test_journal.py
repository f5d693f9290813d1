from __future__ import annotations

from pathlib import Path

import pytest

from billhook.layerworkers.errors import InputError, RunError
from billhook.orchestrator.history import history_of
from billhook.orchestrator.journal import append, journal_path, read_journal


@pytest.fixture
def output(tmp_path: Path) -> Path:
    (tmp_path / "billhook").mkdir()
    append(tmp_path, "plan", {"fingerprint": {"a": 1}})
    append(tmp_path, "block", {"index": 0})
    return tmp_path


def test_lines_come_back(output: Path) -> None:
    lines = read_journal(output)
    assert lines[0]["time"] <= lines[1].pop("time")
    assert lines[0].pop("time") > 1.7e9
    assert lines == [{"kind": "plan", "fingerprint": {"a": 1}}, {"kind": "block", "index": 0}]


def test_every_torn_tail_is_ignored_and_then_overwritten(output: Path) -> None:
    whole = journal_path(output).read_bytes()
    first = whole.index(b"\n") + 1
    for length in range(first, len(whole)):
        journal_path(output).write_bytes(whole[:length])
        assert [line["kind"] for line in read_journal(output)] == ["plan"]
    append(output, "rest", {"tensors": 2})
    assert [line["kind"] for line in read_journal(output)] == ["plan", "rest"]


def test_every_flipped_byte_of_the_last_line_is_noticed(output: Path) -> None:
    whole = journal_path(output).read_bytes()
    for place in range(whole.index(b"\n") + 1, len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 0x01
        journal_path(output).write_bytes(damaged)
        assert [line["kind"] for line in read_journal(output)] == ["plan"]


def test_damage_in_the_middle_is_refused_and_not_taken_for_a_torn_tail(output: Path) -> None:
    append(output, "block", {"index": 1})
    damaged = bytearray(journal_path(output).read_bytes())
    damaged[damaged.index(b'"a"')] ^= 0x01
    journal_path(output).write_bytes(damaged)
    with pytest.raises(InputError, match=r"line 1 is damaged"):
        read_journal(output)


@pytest.mark.parametrize("tail", [b"[]\n", b"[" * 100_000 + b"\n", b"\xff\xfe\n", b"null\n"])
def test_any_tail_is_read_over(output: Path, tail: bytes) -> None:
    with journal_path(output).open("ab") as file:
        file.write(tail)
    assert [line["kind"] for line in read_journal(output)] == ["plan", "block"]


def test_a_gap_in_the_blocks_is_refused() -> None:
    plan = {"kind": "plan", "fingerprint": {}, "source": "", "asked": {}}
    with pytest.raises(InputError, match="commits block 20 after 0 blocks"):
        history_of([plan, {"kind": "block", "index": 20, "kept_inputs": False}])


def test_a_disk_that_fails_is_a_run_error(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("billhook.orchestrator.journal.os.fsync", fail)
    with pytest.raises(RunError, match="the disk is full"):
        append(output, "block", {"index": 1})
