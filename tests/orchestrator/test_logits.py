"""``verify --logits``: the streamed forward against transformers, and the output against its source."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from billhook.orchestrator import InputError, cli, logits, verify


def test_streamed_and_transformers_agree(
    finished: Path, text_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["billhook", "verify", finished, "--logits", "--text", text_file, "--json"]
    monkeypatch.setattr(sys, "argv", [*map(str, command)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    document = json.loads(capsys.readouterr().out)
    assert not stop.value.code
    found = document["logits"]
    assert len(found["streamed_nats"]) == 4
    assert found["streamed_nats"] == found["transformers_nats"]  # to the last bit
    assert 0 < found["against"]["agreement"] < 1
    assert found["against"]["divergence"] > 0


def test_what_computes_something_else_is_a_problem(
    finished: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    differing = logits.LogitsCheck("x", 128, (3.0, 2.0), (3.0, 2.1), logits.TOLERANCE_NATS, None)
    monkeypatch.setattr("billhook.orchestrator.verification.check_logits", lambda *_: differing)
    found = verify(finished, logits=True, text=str(text_file))
    assert [(problem.name, problem.reason) for problem in found.problems] == [
        ("logits", "streamed and in transformers they differ by 0.1000 nats per token, 0.02 are allowed")
    ]


def test_a_model_that_transformers_has_no_room_for_is_told_before_anything_is_computed(
    finished: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("billhook.orchestrator.budgets.machine_ram_bytes", lambda: 100_000)
    with pytest.raises(InputError, match=r"--logits: transformers holds the whole model, 0\.4 MiB in bfloat16"):
        verify(finished, logits=True, text=str(text_file))
