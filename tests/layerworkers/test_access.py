"""The output is opened once: what takes its name later is not written to."""

from __future__ import annotations

from pathlib import Path

import pytest

from billhook.layerworkers.access import OpenFiles, OutputAccess
from billhook.layerworkers.errors import RunError


def make_output(folder: Path, proof: str) -> OutputAccess:
    (folder / "inside").mkdir(parents=True)
    (folder / "inside" / "lock").write_text(proof)
    for name in ("first", "second"):
        (folder / name).write_bytes(bytes(4))
    return OutputAccess(str(folder), str(folder / "inside" / "lock"), proof)


def test_a_file_that_is_opened_later_is_one_of_the_folder_that_was_there_at_first(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    files = OpenFiles(make_output(folder, "one"))
    files.write(str(folder / "first"), 0, memoryview(b"one1"))
    folder.rename(tmp_path / "gone")
    make_output(folder, "two")
    files.write(str(folder / "first"), 0, memoryview(b"one2"))
    files.write(str(folder / "second"), 1, memoryview(b"one"))
    assert ((tmp_path / "gone" / "first").read_bytes(), (folder / "first").read_bytes()) == (b"one2", bytes(4))
    assert ((tmp_path / "gone" / "second").read_bytes(), (folder / "second").read_bytes()) == (b"\0one", bytes(4))


def test_another_output_than_the_one_that_is_meant_is_not_opened(tmp_path: Path) -> None:
    meant = make_output(tmp_path / "out", "one")
    (tmp_path / "out").rename(tmp_path / "gone")
    with pytest.raises(RunError, match="No such file"):
        OpenFiles(meant)
    make_output(tmp_path / "out", "one, and another")
    with pytest.raises(RunError, match="is not the output that this run writes"):
        OpenFiles(meant)


def test_a_file_that_is_not_there_is_named_whole(tmp_path: Path) -> None:
    files = OpenFiles(make_output(tmp_path / "out", "one"))
    with pytest.raises(RunError, match=str(tmp_path / "out" / "third")):
        files.write(str(tmp_path / "out" / "third"), 0, memoryview(b"x"))
