"""Which way of working a budget leads to; the sizes are those of real shapes, known from their configs alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from billhook.orchestrator import InputError, Plan, plan
from billhook.orchestrator.budgets import machine_ram_bytes
from billhook.orchestrator.planning import estimate
from billhook.orchestrator.printing import plan_as_json, plan_as_text

GIB = 1 << 30


@pytest.fixture(scope="module")
def shape_of_8b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("config")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_hidden_layers": 2,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(autouse=True)
def process_of_300_mib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("billhook.orchestrator.planning.own_bytes", lambda pid: 300 << 20)


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
    assert "elsewhere" in plan_as_text(made)


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
    ram_bytes = int(0.9 * ram(planned(shape_of_8b, ram=64 * GIB)))
    spilling = planned(shape_of_8b, ram=ram_bytes, intermediates="spill", statistics="disk")
    assert spilling.arrangement.peak.disk > 0
    without = estimate(spilling).bytes_written
    made = planned(shape_of_8b, ram=ram_bytes, disk=without)
    assert made.misfit is None
    assert made.arrangement.peak.disk == 0


def test_excluding_the_first_linear_of_a_group_counts_what_it_has_made(shape_of_8b: Path) -> None:
    options: dict[str, Any] = {"ram": 64 * GIB, "samples": 64, "intermediates": "hold", "statistics": "device"}
    whole, part = (planned(shape_of_8b, **options, **more) for more in ({}, {"exclude": "gate_proj"}))
    before = whole.arrangement.phases["statistics of mlp.gate_proj"].device
    assert part.arrangement.phases["statistics of mlp.up_proj"].device - before > 0.5 * 64 * 512 * 14336 * 2


def test_sizes_are_read_as_people_write_them(shape_of_8b: Path) -> None:
    assert planned(shape_of_8b, ram="20GB").budgets.ram == 20_000_000_000
    assert planned(shape_of_8b, ram="20 GiB").budgets.ram == 20 * GIB
    with pytest.raises(InputError, match="option ram"):
        planned(shape_of_8b, ram="much")


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
