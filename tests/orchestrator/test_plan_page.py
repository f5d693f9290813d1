"""The page of a plan: short, with bars against the budgets, and warned of what may not be meant."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from billhook.orchestrator import Plan, pages, plan
from billhook.orchestrator.devices import DEVICES
from billhook.orchestrator.pages import BAR_WIDTH, EMPTY, FULL, show, usage
from billhook.orchestrator.plan_page import plan_as_text, plan_page
from billhook.orchestrator.plan_warnings import plan_warnings
from billhook.orchestrator.planning import estimate
from billhook.orchestrator.printing import plan_as_json

GIB = 1 << 30


@pytest.fixture(autouse=True)
def the_same_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this one has to do beside."""
    monkeypatch.setattr("billhook.orchestrator.planning.own_bytes", lambda pid: 300 << 20)
    monkeypatch.setattr("billhook.orchestrator.planning.measured_rates", lambda model: DEVICES["cpu-core"].rates)


def planned(folder: Path, **options: Any) -> Plan:
    usual = {"seqlen": 2048, "device": "cpu", "workers": 1, "ram": 256 * GIB, "calibration": "text.txt"}
    return plan(folder, **{**usual, **options})


def test_the_page_is_short_and_tells_what_is_pruned_skipped_and_taken(shape_of_8b: Path) -> None:
    made = planned(shape_of_8b, exclude=("q_proj", "k_proj"))
    lines = plan_as_text(made).splitlines()
    assert len(lines) < 20
    page = {line[:11].strip(): line[11:] for line in lines if line[:11].strip()}
    assert page["prunes"].startswith("10 linears, ")
    assert "4 linears, by --include and --exclude: self_attn.q_proj 4096x4096, self_attn.k_proj 1024x4096" in "".join(
        lines
    )
    assert page["calibrates"] == "128 samples of 2048 tokens from text.txt"
    peak = estimate(made).peak_bytes["ram"]
    assert page["RAM"].count(FULL) == round(BAR_WIDTH * peak / (256 * GIB))
    assert page["RAM"].count(FULL) + page["RAM"].count(EMPTY) == BAR_WIDTH
    assert f"{peak / GIB:.2f} GiB of 256.00 GiB, {peak / (256 * GIB):.0%}" in page["RAM"]
    assert "GPU" not in page
    assert "output and scratch" in page["disk"]
    assert page["time"].startswith("about ")
    assert "warning" not in page


def test_details_are_there_when_asked_for(shape_of_8b: Path) -> None:
    made = planned(shape_of_8b)
    page, details = plan_as_text(made), plan_as_text(made, details=True)
    for told in ("ridge=0.1", "phases", "intermediates hold", "elsewhere", "FLOP"):
        assert told in details
        assert told not in page
    assert set(page.splitlines()[:-1]) < set(details.splitlines())


def test_a_gpu_and_what_stands_for_one_have_bars_of_their_own(shape_of_8b: Path) -> None:
    on_gpu = plan(shape_of_8b, assume_device="h100", seqlen=2048, samples=16)
    assert any(line.startswith("GPU        ") and "each worker" in line for line in plan_as_text(on_gpu).splitlines())
    assert "RAM        no limit" not in plan_as_text(on_gpu)
    within = planned(shape_of_8b, vram=8 * GIB)
    assert f"of 8.00 GiB, {within.arrangement.peak.device / (8 * GIB):.0%}, each worker's device part" in plan_as_text(
        within
    )


def test_what_does_not_fit_is_said_on_the_page(shape_of_8b: Path) -> None:
    made = planned(shape_of_8b, ram=1 * GIB)
    assert made.misfit is not None
    page = plan_as_text(made)
    assert "DOES NOT FIT: --ram 1024MiB: too small" in page
    assert FULL * BAR_WIDTH in page


@pytest.mark.parametrize(
    ("options", "warning"),
    [
        ({"calibration": None}, "--calibration is not given: prune needs it for auto"),
        ({"calibration": "random"}, "random tokens tell nothing of text"),
        ({"samples": 4, "seqlen": 512}, "a tiny calibration of 2048 tokens"),
        ({"samples": 4}, "0.57 tokens for each of the 14336 channels that enter mlp.down_proj"),
        ({"samples": 4}, "is singular"),
        ({"samples": 16}, "is mostly noise"),
        ({"pattern": "4:8"}, "the pattern 4:8: the sparse units of GPUs take 2:4 only"),
        ({"method": "magnitude"}, "magnitude looks at no activations: at sparsity 0.5"),
        ({"sparsity": 0.8}, "sparsity 0.8: pruned at one stroke"),
    ],
)
def test_what_may_not_be_meant_is_warned_of(shape_of_8b: Path, options: dict[str, Any], warning: str) -> None:
    made = planned(shape_of_8b, **options)
    assert any(warning in each for each in plan_warnings(made)), plan_warnings(made)
    assert not any(warning in each for each in plan_warnings(planned(shape_of_8b)))
    assert plan_as_json(made)["warnings"] == list(plan_warnings(made))
    assert warning in plan_as_text(made)


def test_a_budget_that_is_nearly_full_is_warned_of(shape_of_8b: Path) -> None:
    peak = estimate(planned(shape_of_8b, samples=64)).peak_bytes["ram"]
    for ram, warned in ((int(peak / 0.95), True), (2 * peak, False)):
        warnings = plan_warnings(planned(shape_of_8b, samples=64, ram=ram))
        assert any("--ram is nearly full: 95% of the budget" in each for each in warnings) == warned, warnings


def test_methods_that_need_no_gram_or_no_samples_are_not_warned_about_their_channels(shape_of_8b: Path) -> None:
    for method in ("wanda", "magnitude"):
        assert not any("channels" in each for each in plan_warnings(planned(shape_of_8b, method=method, samples=4)))
    assert not any("calibration" in each for each in plan_warnings(planned(shape_of_8b, method="magnitude")))


def test_colours_are_for_terminals_and_bars_for_encodings_that_have_them(
    shape_of_8b: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = plan_page(planned(shape_of_8b))
    show(page)
    assert capsys.readouterr().out == page.plain + "\n"
    terminal = io.StringIO()
    monkeypatch.setattr(pages, "Console", lambda **ways: Console(file=terminal, force_terminal=True, **ways))
    show(page)
    assert "\x1b[32m" in terminal.getvalue()
    monkeypatch.undo()
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", ascii_only)
    show(page)
    ascii_only.flush()
    assert ascii_only.buffer.getvalue().decode("ascii") == page.plain.replace(FULL, "#").replace(EMPTY, ".") + "\n"  # type: ignore[attr-defined]


@pytest.mark.parametrize(("used", "style"), [(89, "green"), (90, "yellow"), (100, "yellow"), (101, "red")])
def test_a_bar_turns_yellow_before_its_limit_and_red_behind_it(used: int, style: str) -> None:
    assert usage(used * GIB, 100 * GIB).spans[0].style == style
