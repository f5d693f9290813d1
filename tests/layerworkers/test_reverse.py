"""Gradients of the whole model's loss, block by block, against those of the whole model at once."""

from __future__ import annotations

import threading
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from solved_alone import solved
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM

from billhook.layerworkers.collective import Alone, Collective
from billhook.layerworkers.errors import NotFiniteError, OptionError
from billhook.layerworkers.files import read_bytes
from billhook.layerworkers.head import Head
from billhook.layerworkers.losses import loss_gradient
from billhook.layerworkers.methods import METHODS, method_named
from billhook.layerworkers.patterns import NM, Unstructured
from billhook.layerworkers.reverse import ReverseTask, WrittenRoots
from billhook.layerworkers.shards import read_tensor
from billhook.layerworkers.tasks import Sample
from billhook.layerworkers.worker import BlockWorker
from billhook.orchestrator.calibration import Windows, deal_samples
from billhook.orchestrator.checkpoint import Checkpoint, float_shard
from billhook.orchestrator.model import open_model
from billhook.orchestrator.output import create_shards

CPU = torch.device("cpu")
SAMPLES, TOKENS = 5, 24
WINDOWS = torch.randint(0, 200, (SAMPLES, TOKENS), generator=torch.Generator().manual_seed(3)).tolist()
_OPENING = threading.Lock()


def roots(folder: Path, output: Path, group: Collective, tier: str = "device") -> dict[str, Tensor]:
    """Return the root mean squares of the gradients of all linears of blocks, by name on disk."""
    with _OPENING:
        model = open_model(folder, "cpu", "float32", False)
        files = [
            float_shard(
                folder, f"{block.index}.safetensors", "F32", {each.disk_name: each.shape for each in block.linears}
            )
            for block in model.layout.blocks
        ]
        own = output / str(group.size)
        if not own.is_dir():
            own.mkdir(parents=True)
            create_shards(own, Checkpoint(folder, tuple(files), ()))
        worker = BlockWorker(model.worker_setup(1, tier, str(output)), group)
    group.exchange({})  # while one is opened, modules of all threads are made on the meta device
    windows = Windows(tuple(map(tuple, WINDOWS)), "")
    worker.start(model.layout.stem, deal_samples(windows, 2, group.size)[group.rank])
    for block in model.layout.blocks:
        worker.enter_block(block.index, block.tensors)
    worker.turn_back()
    group.exchange({})  # going back, a thread chooses attention's implementation for all of them
    found = {}
    for block, shard in zip(reversed(model.layout.blocks), reversed(files), strict=True):
        entries = {
            each.name: replace(entry, path=f"{own}/{shard.name}.part")
            for each, entry in zip(block.linears, shard.entries, strict=True)
        }
        worker.leave_block(ReverseTask(block.index, block.tensors, entries, SAMPLES, TOKENS - 1, 2, tier))
        worker.finish_writing()
        group.exchange({})
        found |= {entry.name: read_tensor(entry) for entry in entries.values()}
    return found


def of_autograd(folder: Path) -> dict[str, Tensor]:
    whole: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    parameters = dict(whole.named_parameters())
    sums = {name: torch.zeros_like(value) for name, value in parameters.items()}
    for window in WINDOWS:
        whole.zero_grad()
        tokens = torch.tensor([window])
        functional.cross_entropy(whole(tokens).logits[0, :-1], tokens[0, 1:]).backward()
        for name, value in parameters.items():
            sums[name] += 0 if value.grad is None else value.grad.square()
    return {name: (value / SAMPLES).sqrt() for name, value in sums.items()}


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_they_are_those_of_the_whole_model(make_model: Any, family: str, tmp_path: Path) -> None:
    folder = make_model(family, **FAMILIES[family])
    found, expected = roots(folder, tmp_path, Alone()), of_autograd(folder)
    assert found
    for name, value in found.items():
        theirs = next(each for key, each in expected.items() if key.endswith(name))
        theirs = theirs if theirs.shape == value.shape and family != "gpt2" else theirs.T
        torch.testing.assert_close(value, theirs, rtol=1e-3, atol=1e-7)
        assert value.count_nonzero() > 0.9 * value.numel()


@pytest.mark.parametrize(("workers", "tier"), [(2, "device"), (3, "disk")])
def test_no_bit_depends_on_the_number_of_workers(
    llama: Path, run_group: Any, tmp_path: Path, workers: int, tier: str
) -> None:
    (alone,) = run_group(1, lambda group: roots(llama, tmp_path / "a", group))
    for found in run_group(workers, lambda group: roots(llama, tmp_path / "b", group, tier)):
        assert found.keys() == alone.keys()
        assert all(torch.equal(found[name], alone[name]) for name in alone)


def test_the_head_goes_back_as_one_matrix_would(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("billhook.layerworkers.head.HEAD_SLICE_BYTES", 1)  # 256 rows at once
    entry = open_model(llama, "cpu", "float32", False).layout.stem.head
    assert entry.shape[0] > 256
    hidden = torch.randn(1, 6, entry.shape[1], requires_grad=True)
    whole = functional.linear(hidden, read_tensor(entry).float())
    gradient = torch.randn_like(whole)
    (expected,) = torch.autograd.grad(whole, hidden, gradient)
    sliced = Head(entry)(hidden)
    torch.testing.assert_close(sliced, whole)
    torch.testing.assert_close(torch.autograd.grad(sliced, hidden, gradient)[0], expected, rtol=1e-4, atol=1e-5)


def test_the_gradient_by_logits_is_that_of_autograd() -> None:
    logits = torch.randn(200, 31, requires_grad=True)  # more targets than are taken at once
    sample = Sample(0, tuple(torch.randint(0, 31, (200,)).tolist()))
    loss = functional.cross_entropy(logits[:-1], torch.tensor(sample.tokens[1:]), reduction="sum")
    (expected,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(loss_gradient(logits.detach(), sample, CPU), expected)
    with pytest.raises(NotFiniteError):
        loss_gradient(torch.full((3, 5), torch.inf), Sample(0, (1, 2, 3)), CPU)


@pytest.mark.parametrize("pattern", [Unstructured(Fraction(1, 2)), NM(2, 4)])
def test_without_gradients_it_is_wanda(pattern: Any) -> None:
    squares = torch.rand(24, 32)
    wanda = solved("wanda", {}, squares, pattern)
    assert torch.equal(solved("gblm", {"alpha": 0.0}, squares, pattern), wanda)
    assert torch.equal(solved("gblm", {}, torch.zeros(24, 32), pattern), wanda)
    assert not torch.equal(solved("gblm", {}, squares, pattern), wanda)


def test_scores_are_the_authors_formula() -> None:
    generator = torch.Generator().manual_seed(1)
    x_TC, weight_RC = torch.randn(64, 32, generator=generator), torch.randn(24, 32, generator=generator)
    gradients_NRC = 1e-3 * torch.randn(4, 24, 32)
    score = weight_RC.abs() * (x_TC.square().sum(0) / 4).sqrt()
    score += weight_RC.abs() * (100 * gradients_NRC).square().sum(0).sqrt()
    order = score.argsort(dim=1)[:, :16]
    expected = weight_RC.scatter(1, order, 0.0)
    found = solved("gblm", {}, gradients_NRC.square().mean(0), Unstructured(Fraction(1, 2)))
    assert torch.equal(found, expected)


def test_a_chain_asks_for_what_its_method_does() -> None:
    chained = method_named("gblm+dsnot")
    assert chained.model_gradients is not None
    assert chained.model_gradients(chained.options(gradient_samples=3)) == 3


@pytest.mark.parametrize("options", [{"alpha": -1.0}, {"gradient_samples": 0}])
def test_options_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(options))):
        METHODS["gblm"].options(**options)


def test_rows_of_what_was_written_are_squared(tmp_path: Path) -> None:
    shard = float_shard(tmp_path, "a", "BF16", {"w": (3, 2)})
    create_shards(tmp_path, Checkpoint(tmp_path, (shard,), ()))
    entry = replace(shard.entries[0], path=f"{tmp_path}/a.part")
    with Path(entry.path).open("r+b") as file:
        file.seek(entry.start_bytes)
        file.write(torch.tensor([[1.0, 2], [3, 4], [5, 6]]).bfloat16().view(torch.uint8).numpy().tobytes())
    assert WrittenRoots(entry, read_bytes)(1, 3).tolist() == [[9.0, 16.0], [25.0, 36.0]]
