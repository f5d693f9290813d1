"""Experts in workers of this process: the same bits however they are done, and nothing left over."""

from __future__ import annotations

import threading
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from families import EXPERTS
from safetensors.torch import load_file, save_file

from billhook.layerworkers.collective import Alone
from billhook.layerworkers.errors import InputError
from billhook.layerworkers.methods import METHODS
from billhook.layerworkers.patterns import Unstructured
from billhook.layerworkers.reduction import even_ranges
from billhook.layerworkers.scratch import DiskParking, _pages
from billhook.layerworkers.tasks import BlockTask, Coverage, LinearReport, LinearTask, Placement, Sample
from billhook.layerworkers.worker import BlockWorker
from billhook.orchestrator.model import open_model

SAMPLES = [
    Sample(index, tuple(torch.randint(0, 500, (24,), generator=torch.Generator().manual_seed(index)).tolist()))
    for index in range(6)
]
LOADING = threading.Lock()
"""Models are made on the meta device by a switch that all threads share."""


class Kept:
    """Output files that are kept here."""

    def __init__(self) -> None:
        self.pieces: dict[tuple[str, int], bytes] = {}

    def read(self, path: str, start_bytes: int, size_bytes: int) -> torch.Tensor:
        raise NotImplementedError

    def write(self, path: str, start_bytes: int, view: memoryview) -> None:
        self.pieces[Path(path).name, start_bytes] = bytes(view)

    def sync(self, path: str) -> None:
        """Nothing."""

    def close(self, path: str) -> None:
        """Nothing."""


Done = tuple[dict[tuple[str, int], bytes], list[tuple[LinearReport, ...]], list[torch.Tensor], int]
"""What was written, the reports, the hidden states after the last block, and the bytes left in scratch files."""


def pruned(
    folder: Path,
    group: Any,
    method: str,
    fit: str,
    coverage: Coverage,
    placement: Placement,
    ready: threading.Barrier | None = None,
) -> Done:
    files = Kept()
    with LOADING:
        model = open_model(folder, "cpu", "auto", False)
        worker = BlockWorker(model.worker_setup(1), group, files=files)
    if ready is not None:
        ready.wait()
    start, stop = even_ranges(3, group.size)[group.rank]
    worker.start(model.layout.stem, SAMPLES[2 * start : 2 * stop])
    options, reports = METHODS[method].options(), []
    for block in model.layout.blocks:
        linears = tuple(
            LinearTask(each.disk_name, each.name, Unstructured(Fraction(1, 2)), method, options)
            for each in block.linears
        )
        task = BlockTask(
            *(block.index, block.tensors, block.others, linears, fit, "/nowhere", 2, 3, 16, placement),
            coverage=coverage,
        )
        reports.append(worker.prune_block(task).linears)
    worker.finish_writing()
    parking = worker._held.parking("disk")
    assert isinstance(parking, DiskParking)
    left = parking._used - sum(_pages(size) * len(places) for size, places in parking._free.items())
    return files.pieces, reports, [hidden.clone() for hidden in worker._held.hidden], left


@pytest.mark.parametrize("fallback", ["pool", "magnitude", "dense"])
@pytest.mark.parametrize(("method", "fit"), [("sparsegpt", "lockstep"), ("wanda", "dense-block")])
def test_fallbacks_give_the_same_bits_however_experts_are_done(
    make_model: Any, run_group: Any, method: str, fit: str, fallback: str
) -> None:
    folder = make_model("qwen3_moe", num_hidden_layers=2, **EXPERTS["qwen3_moe"])
    coverage = Coverage(0.6, fallback)  # some experts are sent as many, and some are not
    whole = pruned(folder, Alone(), method, fit, coverage, Placement())
    few = {report.fallback for reports in whole[1] for report in reports if report.tokens is not None}
    assert few == {"", fallback}
    frugal = Placement("replay", "disk", "disk", False, 1)
    kept = Placement("spill" if fit == "lockstep" else "hold", "disk", "disk", True, 3)
    for workers, placement in ((2, frugal), (3, kept)):
        ready = threading.Barrier(workers)
        parts: list[Done] = run_group(
            workers,
            lambda group, placement=placement, ready=ready: pruned(
                folder, group, method, fit, coverage, placement, ready
            ),
        )
        written = {where: piece for part in parts for where, piece in part[0].items()}
        assert written == whole[0]
        assert all(part[1] == whole[1] for part in parts)
        hidden = [each for part in parts for each in part[2]]
        assert all(torch.equal(one, other) for one, other in zip(hidden, whole[2], strict=True))
        assert [part[3] for part in parts] == [0] * workers


def test_experts_that_transformers_cannot_stack_are_refused(make_model: Any) -> None:
    folder = make_model("gpt_oss", shard_size="1GB", **EXPERTS["gpt_oss"])
    path = folder / "model.safetensors"
    tensors = {**load_file(path), "model.layers.0.mlp.experts.0.down_proj.weight": torch.zeros(4, 4)}
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match="has tensors of its own on disk, and transformers has no rule"):
        open_model(folder, "cpu", "auto", False)


def test_a_block_that_cannot_be_run_without_weights_is_refused(make_model: Any) -> None:
    folder = make_model("jetmoe", num_local_experts=4, num_experts_per_tok=2, kv_channels=16)
    with pytest.raises(InputError, match=r"JetMoeForCausalLM: block 0 cannot be run without its weights"):
        open_model(folder, "cpu", "auto", False)


@pytest.mark.parametrize("family", ["qwen2_moe", "afmoe", "deepseek_v3", "llama4_text"])
def test_routers_are_never_pruned(make_model: Any, family: str) -> None:
    overrides = EXPERTS.get(family, {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48})
    overrides = {**overrides, **({"head_dim": 16, "num_dense_layers": 1} if family == "afmoe" else {})}
    layout = open_model(make_model(family, **overrides), "cpu", "auto", False).layout
    names = [linear.name for block in layout.blocks for linear in block.linears]
    assert any("experts" in name for name in names)
    assert not any("router" in name or name.endswith(("mlp.gate", "expert_gate")) for name in names)
