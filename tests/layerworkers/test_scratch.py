"""What is parked comes back unchanged, takes the room that it says, and leaves nothing behind."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from billhook.layerworkers import files
from billhook.layerworkers.activations import Activations
from billhook.layerworkers.errors import RunError
from billhook.layerworkers.live import LiveTensors, ParkedTensors
from billhook.layerworkers.scratch import DiskParking, MemoryParking, Parking, bands
from billhook.layerworkers.statistics import GRAM, Accumulator
from billhook.orchestrator.model import open_model


@pytest.fixture(params=["memory", "disk"])
def parking(request: pytest.FixtureRequest, tmp_path: Path) -> Parking:
    return MemoryParking() if request.param == "memory" else DiskParking(str(tmp_path / "scratch"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.int64])
def test_what_is_parked_comes_back(parking: Parking, dtype: torch.dtype) -> None:
    tensor = torch.randint(0, 2, (7, 5, 3)).to(dtype)
    expected = tensor.clone()
    parked = parking.park(tensor)
    tensor.zero_()
    assert torch.equal(parked.rows(2, 6), expected[2:6])
    assert parked.shape == expected.shape
    assert torch.equal(parked.take(), expected)


def test_the_scratch_file_has_no_name_and_uses_freed_places_again(tmp_path: Path) -> None:
    parking = DiskParking(str(tmp_path / "scratch"))
    for _ in range(5):
        parked = [parking.park(torch.full((3000,), float(number))) for number in range(4)]
        assert [float(each.take()[0]) for each in parked] == [0.0, 1.0, 2.0, 3.0]
    assert parking.peak_bytes == 4 * 12288
    assert os.listdir(tmp_path / "scratch") == []


def test_a_scratch_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"--scratch .*file.*: cannot be written to"):
        DiskParking(str(tmp_path / "file"))


def test_views_of_one_piece_of_memory_still_share_it_afterwards(parking: Parking) -> None:
    base = torch.arange(24.0).view(4, 6)
    views = [base, base[1:3], base.t(), base[:, ::2]]
    expected = [view.clone() for view in views]
    parked = ParkedTensors(views, parking)
    assert all(view.numel() == 0 for view in views)
    parked.restore()
    assert all(torch.equal(view, other) for view, other in zip(views, expected, strict=True))
    views[1][0, 0] = 99.0
    assert base[1, 0] == 99.0


def test_live_tensors_are_those_that_somebody_holds() -> None:
    live = LiveTensors()
    with torch.inference_mode(), live.watching():
        kept = torch.ones(1000) * 2
        dropped = kept + 1
        view = kept[10:20]
        del dropped
    assert live.size_bytes() == 4000
    assert len(live.tensors()) == 2
    assert view.shape == (10,)


@pytest.mark.parametrize("where", ["device", "parked"])
def test_activations_are_replaced_one_by_one(where: str, tmp_path: Path) -> None:
    parking = DiskParking(str(tmp_path)) if where == "parked" else None
    activations = Activations(torch.device("cpu"), parking)
    for number in range(3):
        activations.append(torch.full((1, 4, 8), float(number)))
    for number in range(3):
        activations[number] = activations[number] + 10
    assert [float(state[0, 0, 0]) for state in activations] == [10.0, 11.0, 12.0]
    if parking is not None:
        assert parking.peak_bytes == 3 * 4096


def test_parked_sums_leave_one_sum_in_memory(tmp_path: Path) -> None:
    parking = DiskParking(str(tmp_path))
    torch.manual_seed(0)
    inputs = [torch.randn(1, 6, 16) for _ in range(11)]
    totals = []
    for each in (None, parking):
        accumulator = Accumulator(GRAM, 16, 2, torch.device("cpu"), each)
        for number, x in enumerate(inputs):
            accumulator.add(number, x)
        nodes = accumulator.nodes()
        assert [node.partitions for node in nodes] == [4, 2]
        if each is not None:
            assert [isinstance(node.total, torch.Tensor) for node in nodes] == [False, True]
        totals.append(
            [
                torch.as_tensor(node.total.take() if not isinstance(node.total, torch.Tensor) else node.total)
                for node in nodes
            ]
        )
    assert all(torch.equal(a, b) for a, b in zip(*totals, strict=True))


def test_bands_cover_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("billhook.layerworkers.scratch.BAND_BYTES", 100)
    assert list(bands((7, 10))) == [(0, 2), (2, 4), (4, 6), (6, 7)]
    assert list(bands((250,))) == [(start, min(start + 25, 250)) for start in range(0, 250, 25)]
    assert list(bands((2, 1000))) == [(0, 1), (1, 2)]


def test_a_long_range_is_read_in_pieces_and_in_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "READ_PIECE_BYTES", 1000)
    content = bytes(torch.randint(0, 256, (12_345,), dtype=torch.uint8).tolist())
    (tmp_path / "file").write_bytes(content)
    path = str(tmp_path / "file")
    assert bytes(files.read_bytes(path, 17, 12_000).tolist()) == content[17:12_017]
    with pytest.raises(RunError, match="ends at byte 12345, expected 12400"):
        files.read_bytes(path, 400, 12_000)


def test_the_footprint_of_a_block_grows_with_the_tokens_and_tells_what_waits(llama: Path) -> None:
    skeleton = open_model(llama, "cpu", "auto", False).skeleton
    one, two = skeleton.footprints(32)[0], skeleton.footprints(64)[0]
    hidden = 32 * 64 * 2
    assert one.hidden_bytes == hidden
    assert two.running_bytes >= 1.9 * one.running_bytes
    # Before the down projection: the residual, and the product of gate and up.
    assert one.waiting_bytes["mlp.down_proj"] >= hidden + 32 * 144 * 2
    assert one.running_bytes >= max(one.waiting_bytes.values())
    facts: Any = skeleton.facts(0)
    assert set(one.waiting_bytes) == {group.stop for group in facts.input_groups}


def test_places_that_the_file_system_does_not_take_back_are_used_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("billhook.layerworkers.scratch.punch_hole", lambda *_: False)
    parking = DiskParking(str(tmp_path))
    for _ in range(3):
        for pages in (1, 2):
            parking.park(torch.ones(pages * 4096, dtype=torch.uint8)).give_up()
    assert parking.peak_bytes == 3 * 4096


def test_a_file_that_grows_gives_freed_places_of_other_sizes_back_first(tmp_path: Path) -> None:
    parking = DiskParking(str(tmp_path))
    for pages in range(1, 9):
        parking.park(torch.ones(pages * 4096, dtype=torch.uint8)).give_up()
    kept = parking.park(torch.full((9 * 4096,), 7, dtype=torch.uint8))
    if parking.peak_bytes > 9 * 4096:
        pytest.skip("this file system cannot give blocks back")
    assert int(kept.take().sum()) == 7 * 9 * 4096
