"""What a block is predicted to take on machines that are not here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from billhook.orchestrator import InputError, Plan, plan
from billhook.orchestrator.devices import DEVICES
from billhook.orchestrator.plan_page import plan_as_text
from billhook.orchestrator.planning import estimate
from billhook.orchestrator.printing import plan_as_json


@pytest.fixture(scope="module")
def shape(shape_of_8b: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in float16."""
    folder = tmp_path_factory.mktemp("config")
    config = (shape_of_8b / "config.json").read_text()
    (folder / "config.json").write_text(config.replace("bfloat16", "float16"))
    return folder


def planned(folder: Path, device: str = "h100", **options: Any) -> Plan:
    return plan(folder, assume_device=device, **{"seqlen": 2048, **options})


def test_a_gpu_is_planned_for_where_there_is_none(shape: Path) -> None:
    made = planned(shape, workers=4, bandwidth="12GB/s")
    assert (made.request.recipe.device, made.request.recipe.dtype, made.workers.count) == ("cuda", "float16", 4)
    assert (made.rates, made.connection.bandwidth_bytes) == (DEVICES["h100"].rates, 12e9)
    assert made.misfit is None
    document = plan_as_json(made)
    assert document["peak_bytes"]["vram"] > 0
    (kind,) = document["block_kinds"]
    assert kind["blocks"] == 2
    assert kind["seconds"] == pytest.approx(sum(made.times[0].parts.values()))
    assert 2 * kind["moved_bytes"] == document["moved_bytes"] > 0
    assert f"{kind['limit']} limit" in plan_as_text(made, details=True)


@pytest.mark.parametrize("device", list(DEVICES))
def test_two_workers_halve_what_is_shared_and_no_more(shape: Path, device: str) -> None:
    one, two = (planned(shape, device, workers=workers).times[0] for workers in (1, 2))
    assert two.forward == pytest.approx(one.forward / 2)
    assert two.statistics == pytest.approx(one.statistics / 2)
    assert two.factors == one.factors
    assert one.solving / 2 <= two.solving <= one.solving
    assert one.moved_bytes == one.moving == 0 < two.moving
    assert one.flops == two.flops


def test_partitions_bound_how_many_workers_share_the_samples(shape: Path) -> None:
    eight, many = (planned(shape, workers=workers, samples=32).times[0] for workers in (8, 64))
    assert many.forward == eight.forward
    assert many.moved_bytes > eight.moved_bytes


def test_a_slow_connection_is_said_to_be_the_limit(shape: Path) -> None:
    options: dict[str, Any] = {"workers": 2, "method": "wanda"}
    fast, slow = (planned(shape, **options, bandwidth=rate).times[0] for rate in ("1000GB/s", "10MB/s"))
    assert (fast.limit, slow.limit) == ("forward", "moving")
    assert slow.moving > 10 * fast.moving
    assert slow.forward == fast.forward


def test_files_are_the_limit_where_little_is_computed(shape: Path) -> None:
    time = planned(shape, workers=1, method="magnitude").times[0]
    assert time.limit == "files"
    assert time.seconds == time.files > sum(time.parts.values())


def test_a_connection_alone_may_be_supposed(shape: Path) -> None:
    made = plan(shape, workers=2, bandwidth=1e9, device="cpu", samples=8, seqlen=128)
    assert made.connection.bandwidth_bytes == 1e9
    assert made.rates not in [device.rates for device in DEVICES.values()]
    assert estimate(made).seconds >= sum(time.moving for time in made.times)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"assume_device": "h1000"}, "did you mean 'h100'"),
        ({"assume_device": "h100", "device": "cpu"}, "contradicts --assume-device"),
        ({"bandwidth": "fast"}, "expected bytes per second, as 12GB/s"),
        ({"bandwidth": "0GB/s"}, "expected bytes per second, as 12GB/s"),
    ],
)
def test_wrong_suppositions_are_refused(shape: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        plan(shape, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_supposed_must_be_here(shape: Path) -> None:
    with pytest.raises(InputError, match="finds no CUDA device"):
        plan(shape, device="cuda")
