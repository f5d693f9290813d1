"""What is planned of feed-forward networks that are pruned in turns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from billhook.layerworkers.errors import OptionError
from billhook.orchestrator import Plan, plan
from billhook.orchestrator.devices import DEVICES
from billhook.orchestrator.planning import estimate

HIDDEN, BETWEEN, SAMPLES, TOKENS = 4096, 14336, 16, 512


@pytest.fixture(autouse=True)
def the_same_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this one has to do beside."""
    monkeypatch.setattr("billhook.orchestrator.planning.own_bytes", lambda pid: 300 << 20)
    monkeypatch.setattr("billhook.orchestrator.planning.measured_rates", lambda model: DEVICES["cpu-core"].rates)


def planned(folder: Path, method: str = "sparsellm", **options: Any) -> Plan:
    asked = {"samples": SAMPLES, "seqlen": TOKENS, "device": "cpu", "workers": 1, "ram": 256 << 30}
    return plan(folder, method=method, **{**asked, **options})


def test_auxiliaries_wait_where_hidden_states_do(shape_of_8b: Path) -> None:
    kept = (
        SAMPLES * TOKENS * 2 * (2 * HIDDEN + 2 * BETWEEN)
    )  # what enters and leaves, and of two linears what they make
    phases = {tier: planned(shape_of_8b, activations=tier).arrangement.phases for tier in ("device", "disk")}
    assert phases["disk"]["auxiliaries"].disk - phases["disk"]["read"].disk >= kept
    assert phases["device"]["auxiliaries"].disk == 0
    assert phases["device"]["auxiliaries"].device - phases["disk"]["auxiliaries"].device >= kept
    for each in ("auxiliaries", "refitting"):
        assert phases["device"][each].device > 4 * BETWEEN * (BETWEEN + HIDDEN)  # the sums for the last linear


def test_without_epochs_the_plan_is_sparsegpts(shape_of_8b: Path) -> None:
    turns, none, plain = (
        planned(shape_of_8b),
        planned(shape_of_8b, options={"epochs": 0}),
        planned(shape_of_8b, "sparsegpt"),
    )
    assert (none.times, none.arrangement) == (plain.times, plain.arrangement)
    assert estimate(turns).peak_bytes["ram"] > estimate(plain).peak_bytes["ram"]
    for part in ("forward", "statistics", "factors", "solving"):
        assert getattr(turns.times[0], part) > getattr(plain.times[0], part)


def test_time_grows_with_the_epochs(shape_of_8b: Path) -> None:
    one, two, three = (planned(shape_of_8b, options={"epochs": epochs}, workers=2).times[0] for epochs in (1, 2, 3))
    for part in ("statistics", "factors", "solving", "moving"):
        first, second, third = (getattr(time, part) for time in (one, two, three))
        assert third - second == pytest.approx(second - first)
        assert second > first


def test_a_plan_is_refused_for_what_a_run_would_be(shape_of_8b: Path) -> None:
    with pytest.raises(OptionError, match=r"mlp.down_proj is not among its linears in block 0"):
        planned(shape_of_8b, exclude="down_proj")
    assert planned(shape_of_8b, exclude="mlp").times == planned(shape_of_8b, "sparsegpt", exclude="mlp").times
