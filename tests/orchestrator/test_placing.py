"""Which way of working a budget leads to; the sizes are those of real shapes, known from their configs alone."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from billhook.orchestrator import InputError, Plan, budgets, plan, planning
from billhook.orchestrator.budgets import machine_ram_bytes
from billhook.orchestrator.devices import DEVICES
from billhook.orchestrator.plan_page import plan_as_text
from billhook.orchestrator.planning import estimate, make_plan, output_bytes
from billhook.orchestrator.printing import plan_as_json
from billhook.orchestrator.recipe import read_options
from billhook.orchestrator.request import make_request

GIB = 1 << 30


@pytest.fixture(autouse=True)
def the_same_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this one has to do beside."""
    monkeypatch.setattr("billhook.orchestrator.planning.own_bytes", lambda pid: 300 << 20)
    monkeypatch.setattr("billhook.orchestrator.planning.measured_rates", lambda model: DEVICES["cpu-core"].rates)


def planned(folder: Path, **options: Any) -> Plan:
    options = {"samples": 32, "seqlen": 512, "device": "cpu", "workers": 1, "method": "sparsegpt"} | options
    return plan(folder, **options)


def ram(made: Plan) -> int:
    return estimate(made).peak_bytes["ram"]


def test_a_folder_with_a_config_only_is_planned_from_the_shapes_it_implies(shape_of_8b: Path) -> None:
    made = planned(shape_of_8b)
    assert (
        sum(a * b for linears in made.request.linears for a, b in (linear.shape for linear in linears))
        == 2 * 218_103_808
    )
    document = plan_as_json(made)
    assert document["fits"]
    assert document["bytes_written"] >= 2 * (2 * 218_103_808 + 2 * 32000 * 4096)
    assert set(document["elsewhere"]) == {"80 GB GPU", "24 GB GPU", "CPU"}
    assert "elsewhere" in plan_as_text(made, details=True)


def test_with_memory_to_spare_everything_is_held(shape_of_8b: Path) -> None:
    made = planned(shape_of_8b, ram=64 * GIB)
    assert made.arrangement.activations == "device"
    assert {each.intermediates for each in made.arrangement.placements} == {"hold"}
    assert all(each.read_ahead for each in made.arrangement.placements)
    assert made.arrangement.peak.disk == 0


def test_less_memory_is_made_do_with_and_the_plan_stays_within_it(shape_of_8b: Path) -> None:
    most = ram(planned(shape_of_8b, ram=64 * GIB))
    seen = set()
    for share in (0.95, 0.8, 0.7):
        made = planned(shape_of_8b, ram=int(share * most))
        assert made.misfit is None
        assert ram(made) <= share * most
        seen.add((made.arrangement.placements[0], made.arrangement.activations))
    assert len(seen) > 1
    assert any(placement.intermediates != "hold" or not placement.read_ahead for placement, _ in seen)


def test_too_little_is_refused_with_the_smallest_budget_that_works(shape_of_8b: Path) -> None:
    made = planned(shape_of_8b, ram=GIB)
    assert made.misfit is not None
    assert not estimate(made).fits
    needed = made.misfit.split("works is --ram ")[1].split(" ")[0]
    again = planned(shape_of_8b, ram=needed)
    assert again.misfit is None
    assert again.arrangement.placements == made.arrangement.placements
    assert planned(shape_of_8b, ram=int(0.95 * ram(again))).misfit is not None


def test_the_device_part_of_ram_has_a_budget_of_its_own(shape_of_8b: Path) -> None:
    free, bound = planned(shape_of_8b, ram=64 * GIB), planned(shape_of_8b, ram=64 * GIB, vram="2.2GiB")
    assert free.arrangement.peak.device > 2.2 * GIB >= bound.arrangement.peak.device
    assert bound.arrangement.placements[0].statistics == "ram" or bound.arrangement.activations == "ram"


def test_wanda_never_holds_a_whole_linear_in_float32(shape_of_8b: Path) -> None:
    made = planned(shape_of_8b, method="wanda", samples=8, ram=64 * GIB)
    phases = made.arrangement.phases
    largest_in_float32 = 4 * 4096 * 14336
    assert phases["solving mlp.down_proj"].ram - phases["read"].ram < largest_in_float32 + 4096 * 14336 * 2


def test_auto_workers_become_fewer_where_memory_is_short(shape_of_8b: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(4))
    options: dict[str, Any] = {"method": "wanda", "workers": "auto"}
    assert planned(shape_of_8b, ram=64 * GIB, **options).workers.count == 4
    assert planned(shape_of_8b, ram="3GiB", **options).workers.count < 4


def test_what_the_user_fixes_stays_fixed(shape_of_8b: Path) -> None:
    made = planned(shape_of_8b, ram=64 * GIB, intermediates="replay", activations="disk", statistics="disk")
    assert made.arrangement.activations == "disk"
    assert {(each.intermediates, each.statistics) for each in made.arrangement.placements} == {("replay", "disk")}
    assert made.arrangement.peak.disk >= 32 * 512 * 4096 * 2


def test_a_way_that_needs_less_disk_is_taken_where_disk_is_short(shape_of_8b: Path) -> None:
    ram_bytes = int(0.93 * ram(planned(shape_of_8b, ram=64 * GIB)))
    spilling = planned(shape_of_8b, ram=ram_bytes, intermediates="spill", statistics="disk")
    assert spilling.arrangement.peak.disk > 0
    without = estimate(spilling).bytes_written
    made = planned(shape_of_8b, ram=ram_bytes, disk=without)
    assert made.misfit is None
    assert made.arrangement.peak.disk == 0


def test_excluding_the_first_linear_of_a_group_changes_nothing_of_what_waits(shape_of_8b: Path) -> None:
    options: dict[str, Any] = {"ram": 64 * GIB, "samples": 64, "intermediates": "hold", "statistics": "device"}
    whole, part = (planned(shape_of_8b, **options, **more) for more in ({}, {"exclude": "gate_proj"}))
    before = whole.arrangement.phases["statistics of mlp.gate_proj"].device
    assert part.arrangement.phases["statistics of mlp.up_proj"].device == before


def test_sizes_are_read_as_people_write_them(shape_of_8b: Path) -> None:
    assert planned(shape_of_8b, ram="20GB").budgets.ram == 20_000_000_000
    assert planned(shape_of_8b, ram="20 GiB").budgets.ram == 20 * GIB
    for wrong in ("much", "16", 16, "-3GiB"):
        with pytest.raises(InputError, match="option ram: expected a size with its unit, as 16GiB"):
            planned(shape_of_8b, ram=wrong)


def test_the_smallest_budget_that_is_named_works_and_is_no_more_than_that(shape_of_8b: Path) -> None:
    for option, little in (("ram", "100MiB"), ("vram", "1MiB")):
        misfit = planned(shape_of_8b, **{option: little}).misfit
        assert misfit is not None
        named = re.search(rf"works is --{option} (\d+)MiB", misfit)
        assert named
        assert planned(shape_of_8b, **{option: f"{named[1]}MiB"}).misfit is None
        assert planned(shape_of_8b, **{option: f"{0.95 * int(named[1]):.0f}MiB"}).misfit is not None


def test_no_more_of_a_disk_is_planned_with_than_is_free_on_it(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The output's disk is nearly full, the scratch files' is not; and the other way round."""
    output, scratch = tmp_path / "out", tmp_path / "scratch"
    free = {output: 0, scratch: 0}
    monkeypatch.setattr(budgets, "free_disk_bytes", lambda folder: budgets.DISK_RESERVE_BYTES + free[folder])
    monkeypatch.setattr(budgets, "_disk_of", lambda folder: folder)
    options: Any = {"calibration": "random", "samples": 8, "seqlen": 32, "activations": "disk", "disk": "1GiB"}
    recipe, resources = read_options(None, {**options, "scratch": str(scratch)})
    request = make_request(llama, recipe)
    free |= {output: 1000, scratch: GIB}
    with pytest.raises(InputError, match=r"the output needs \d+MiB, and 1MiB may be used on its disk"):
        make_plan(request, resources, output)
    free |= {output: GIB, scratch: 1000}
    with pytest.raises(InputError, match=r"scratch files need 1MiB"):
        make_plan(request, resources, output)
    free |= {output: GIB, scratch: GIB}
    assert make_plan(request, resources, output).budgets.disk == GIB
    free[output] = output_bytes(request) + 100
    with pytest.raises(InputError, match="--keep-inputs 1: the disk has no room"):
        make_plan(request, resources.model_copy(update={"keep_inputs": 1}), output)
    assert make_plan(request, resources, output).keep_every == 0
    monkeypatch.setattr(planning, "keep_every", lambda *_: 1)
    two = 2 * 8 * 2 * make_plan(request, resources, output).hidden_bytes  # of both streams
    for room, every in ((two, 2), (two - 1, 0), (two + two // 2, 1)):
        free[output] = output_bytes(request) + room
        assert make_plan(request, resources, output).keep_every == every


def test_a_cgroup_limits_the_default(tmp_path: Path) -> None:
    physical = machine_ram_bytes(tmp_path)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/user/run\n")
    group = tmp_path / "sys/fs/cgroup/user/run"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("max\n")
    assert machine_ram_bytes(tmp_path) == physical
    (group.parent / "memory.max").write_text(f"{GIB}\n")
    assert machine_ram_bytes(tmp_path) == GIB
    (tmp_path / "proc/self/cgroup").write_text("5:cpu,memory:/job\n")
    group = tmp_path / "sys/fs/cgroup/memory/job"
    group.mkdir(parents=True)
    (group / "memory.limit_in_bytes").write_text(f"{GIB // 2}\n")
    assert machine_ram_bytes(tmp_path) == GIB // 2
