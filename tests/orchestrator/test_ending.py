"""How commands end: codes, one line for a person, one for a program, tracebacks only where they are asked for."""

from __future__ import annotations

import json
import pickle
import re
import sys
from pathlib import Path

import pytest

from billhook.layerworkers.descriptors import disk_failure
from billhook.layerworkers.errors import (
    BlockLostError,
    InputError,
    Interrupted,
    RunError,
    kinds_of_error,
)
from billhook.orchestrator import cli
from billhook.orchestrator.placing import DoesNotFitError


def run(
    *arguments: object, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["billhook", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


def test_every_kind_of_error_is_in_the_documentation() -> None:
    page = (Path(__file__).parents[2] / "docs" / "errors.md").read_text()
    rows = re.findall(r"^\| `(.+)` \| (\d+) \| (.+) \| (.+) \|$", page, re.MULTILINE)
    kinds = [(kind.code, str(kind.exit_code), kind.cause, kind.remedy) for kind in kinds_of_error()]
    assert rows[:-1] == kinds
    assert rows[-1][:2] == ("bug", "70")
    assert len({code for code, *_ in rows}) == len(rows)


def test_the_hierarchy_has_three_branches_and_exit_codes_follow_them() -> None:
    for kind in kinds_of_error():
        branches = [base for base in (InputError, RunError, Interrupted) if issubclass(kind, base)]
        assert len(branches) == 1
        assert kind.exit_code == {InputError: 2, RunError: 1, Interrupted: 130}[branches[0]]
        copy = pickle.loads(pickle.dumps(kind("what: found; do")))  # they come from workers
        assert (type(copy), str(copy), copy.code) == (kind, "what: found; do", kind.code)
    assert DoesNotFitError.code == "does-not-fit"
    assert BlockLostError.code == "block-lost"


def test_a_full_disk_is_told_from_a_broken_one(tmp_path: Path) -> None:
    full, broken = OSError(28, "No space left on device"), OSError(5, "Input/output error")
    assert disk_failure(str(tmp_path / "x"), "writing", full).code == "disk-full"
    assert disk_failure(str(tmp_path / "x"), "writing", broken).code == "disk-failed"


def test_an_error_is_one_line_for_a_person_and_one_of_json_for_a_program(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, err = run("status", tmp_path / "none", "--json", capsys=capsys, monkeypatch=monkeypatch)
    assert code == 2
    assert err == f"billhook: {tmp_path}/none: no billhook run in this folder\n"
    error = json.loads(out)["error"]
    assert (error["code"], error["exit_code"]) == ("no-run", 2)
    assert error["message"] in err
    assert error["cause"]
    assert error["remedy"]


def test_a_traceback_is_printed_on_request_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)

    def fail(_: object) -> None:
        raise KeyError("nobody thought of it")

    monkeypatch.setattr("billhook.orchestrator.run_status.status", fail)
    code, out, err = run("status", tmp_path, capsys=capsys, monkeypatch=monkeypatch)
    assert (code, out) == (70, "")
    (log,) = tmp_path.glob("billhook-*.log")
    assert err.splitlines() == [
        "billhook: this is a bug in billhook or in a library: KeyError: 'nobody thought of it'; "
        f"the traceback is in {log}"
    ]
    assert "Traceback" in log.read_text()
    log.unlink()
    code, _, err = run("status", tmp_path, "--debug", "--json", capsys=capsys, monkeypatch=monkeypatch)
    assert code == 70
    assert err.startswith("Traceback")
    assert err.endswith("its traceback is above\n")
    assert not list(tmp_path.glob("billhook-*.log"))


def test_an_expected_error_has_no_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code, _, err = run("status", tmp_path, "--debug", capsys=capsys, monkeypatch=monkeypatch)
    assert code == 2
    assert "NoRunError" in err
    assert list(tmp_path.iterdir()) == []
