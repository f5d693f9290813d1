"""Sparsities that are learnt by gradients through masks."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from torch import Tensor, nn
from torch.nn import functional

from billhook.layerworkers import besa
from billhook.layerworkers.besa import (
    PERCENTS,
    Learning,
    LearnTask,
    Masked,
    Shares,
    channel_error,
    learn_block,
    learnt_shares,
    score_order,
    tilt_for,
)
from billhook.layerworkers.block_facts import InputGroup
from billhook.layerworkers.candidates import LoadedBlock, pruned
from billhook.layerworkers.collective import Alone, all_gather
from billhook.layerworkers.gradients import Differentiable
from billhook.layerworkers.tasks import Sample
from billhook.layerworkers.worker import BlockWorker
from billhook.orchestrator.calibration import Windows, deal_samples
from billhook.orchestrator.model import Model, open_model

CPU, SAMPLES, TOKENS, WIDTH = torch.device("cpu"), 6, 7, 24
NAMES = ("qkv", "o", "up", "down")
WINDOWS = torch.randint(0, 500, (5, 24), generator=torch.Generator().manual_seed(3)).tolist()

ONE_AT_A_TIME = threading.Lock()
"""Modules on the meta device are made by switching a device that all threads share."""


class Block(nn.Module):
    """Attention and a gated MLP, in small; of the first so much is noise that it can do without most of it."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, 60, bias=False), nn.Linear(60, WIDTH, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        q, k, v = self.qkv(hidden).unsqueeze(1).chunk(3, dim=-1)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1)
        hidden = hidden + 0.05 * self.o(mixed)
        return hidden + self.down(functional.silu(self.up(hidden)))


def setting() -> tuple[LoadedBlock, list[Tensor]]:
    torch.manual_seed(0)
    module = Block().requires_grad_(False)
    inputs = [torch.randn(1, TOKENS, WIDTH) * torch.linspace(0.2, 3, WIDTH) for _ in range(SAMPLES)]

    def put(name: str, value: Tensor) -> None:
        module.get_submodule(name.removesuffix(".weight")).weight = nn.Parameter(value, requires_grad=False)

    weights: Any = {f"{name}.weight": module.get_submodule(name).weight.clone() for name in NAMES}
    groups = [InputGroup(name, (name,)) for name in NAMES]
    return LoadedBlock(module, groups, {name: f"{name}.weight" for name in NAMES}, weights, put, ((), {})), inputs


def learnt(learning: Learning) -> tuple[list[float], list[int]]:
    """Return what is learnt in the tiny block, and the linears' sizes."""
    block, inputs = setting()
    norms = {name: torch.ones(weight.shape[1]) for name, weight in block.weights.items()}
    targets = [block.module(hidden) for hidden in inputs]
    found = learnt_shares(block, norms, inputs, targets, learning, range(SAMPLES), SAMPLES, CPU, Alone())
    return found, [weight.numel() for weight in block.weights.values()]


def mean(shares: list[float], sizes: list[int]) -> float:
    return sum(share * size for share, size in zip(shares, sizes, strict=True)) / sum(sizes)


@pytest.mark.parametrize("sparsity", [0.05, 0.37, 0.5, 0.7, 0.95, 0.995])
def test_learning_begins_with_the_asked_sparsity_for_all(sparsity: float) -> None:
    assert Shares([3, 4], Learning(sparsity, 1, 5.0, 0.1)).expected() == pytest.approx([sparsity] * 2, abs=1e-9)
    assert abs(tilt_for(0.5)) < 1e-9, "there it is the paper's"


@pytest.mark.parametrize("sparsity", [0.5, 0.7])
def test_gradients_are_those_of_autograd_through_the_soft_mask(sparsity: float) -> None:
    """The hard mask forward, the probabilities of being kept backward: by hand against autograd, entry by entry."""
    block, inputs = setting()
    learning = Learning(sparsity, 1, 5.0, 0.3)
    scale = {name: torch.rand(weight.shape[1]) for name, weight in block.weights.items()}
    shares = Shares([weight.numel() for weight in block.weights.values()], learning)
    shares.theta_LD.data.normal_(generator=torch.Generator().manual_seed(1))
    dense: dict[str, Tensor] = {name: weight.double() for name, weight in block.weights.items()}
    module = block.module.double()
    hidden, target = inputs[0].double(), module(inputs[0].double())

    copies, by_hand = Differentiable(module, NAMES, ((), {})), []
    linears = {
        name: Masked(weight, score_order(block.weights[name], scale[name], CPU)) for name, weight in dense.items()
    }
    for name, linear, share in zip(NAMES, linears.values(), shares.expected(), strict=True):
        linear.write(copies.weight(name), share)
    found = copies.of_weights(hidden, lambda output: channel_error(output, target))
    for linear, gradient in zip(linears.values(), found, strict=True):
        by_hand.append(torch.from_numpy(linear.removal_gradient(gradient)))

    candidates = torch.tensor(PERCENTS, dtype=torch.float64) / 100
    probabilities = shares.probabilities()
    expected = probabilities @ candidates
    weights = {}
    for number, (name, weight) in enumerate(dense.items()):
        columns = weight.shape[1]
        score = block.weights[name].abs() * scale[name]
        ranks = score.argsort(dim=1, stable=True).argsort(dim=1)
        removed_by = torch.stack([ranks < columns * percent // 100 for percent in PERCENTS])
        kept = 1 - (probabilities[number][:, None, None] * removed_by).sum(dim=0)
        hard = (ranks >= int(columns * float(expected[number].detach()))).double()
        weights[name] = weight * (hard + kept - kept.detach())
    sizes = torch.tensor([weight.numel() for weight in dense.values()], dtype=torch.float64)
    away = (expected @ sizes / sizes.sum() - sparsity) / sparsity
    loss = channel_error(torch.func.functional_call(module, weights, (hidden,)), target) + 5.0 * away.square()
    (exact,) = torch.autograd.grad(loss, shares.theta_LD)
    assert float(exact.abs().max()) > 1e-4
    torch.testing.assert_close(shares.gradient(torch.stack(by_hand).numpy()), exact, rtol=1e-4, atol=1e-9)


def test_masks_are_those_of_pruning_by_wandas_scores() -> None:
    weight = torch.randn(40, 33, generator=torch.Generator().manual_seed(0)).round(decimals=1)  # many are alike
    norms = torch.rand(33, generator=torch.Generator().manual_seed(1))
    linear = Masked(weight, score_order(weight, norms, CPU))
    for share in (0.0, 0.31, 0.5, 1.0):
        found = torch.empty_like(weight)
        linear.write(found, share)
        assert torch.equal(found, pruned(weight, norms, share))


def test_a_heavy_penalty_keeps_the_mean_and_none_lets_it_go() -> None:
    heavy, free = learnt(Learning(0.6, 2, 1e6, 0.05)), learnt(Learning(0.6, 2, 0.0, 0.05))
    assert mean(*heavy) == pytest.approx(0.6, abs=0.005)
    assert mean(*free) < 0.59, "what is removed costs"


def error_of(block: LoadedBlock, inputs: list[Tensor], outputs: list[Tensor]) -> float:
    """Mean error of a pruned block's outputs from those of the dense one."""
    for name, weight in block.weights.items():
        block.put(name, weight)
    errors = [float(channel_error(y, block.module(x))) for x, y in zip(inputs, outputs, strict=True)]
    return sum(errors) / len(errors)


def run_learning(sparsity: float) -> tuple[list[float], float, list[int]]:
    """Return what is found for the tiny block, its error when pruned so, and the linears' sizes."""
    block, states = setting()
    (_, inputs), (_, dense) = setting(), setting()
    learning = Learning(sparsity, 3, 5.0, 0.3)
    found = learn_block(block, states, dense, learning, range(SAMPLES), SAMPLES, CPU, Alone())
    return found, error_of(block, inputs, states), [weight.numel() for weight in block.weights.values()]


@pytest.mark.parametrize("sparsity", [0.5, 0.7])
def test_what_is_learnt_costs_less_than_the_same_for_all(sparsity: float, monkeypatch: pytest.MonkeyPatch) -> None:
    found, error, sizes = run_learning(sparsity)
    assert mean(found, sizes) == pytest.approx(sparsity, abs=1e-9), "after what is learnt was shifted"
    assert min(found[:2]) > max(found[2:]), "attention matters little here"
    monkeypatch.setattr(besa, "learnt_shares", lambda *_: [sparsity] * 4)
    _, even, _ = run_learning(sparsity)
    assert error < 0.9 * even
    monkeypatch.setattr(besa, "learnt_shares", lambda *_: [0.1, 0.1, 0.9, 0.9])
    worse, error, _ = run_learning(sparsity)
    assert worse == [sparsity] * 4, "what does not help is left"
    assert error == even


def learned(model: Model, activations: str = "device", group: Any = None, samples: int = 5) -> tuple[Any, ...]:
    """What a worker learns of all blocks, the hidden states that leave the last, and its scratch file's peak."""
    group = Alone() if group is None else group
    windows = Windows(tuple(tuple(window) for window in WINDOWS[:samples]), "")
    with ONE_AT_A_TIME:
        worker = BlockWorker(model.worker_setup(1, activations, dense_stream=True), group)
        worker.start(model.layout.stem, deal_samples(windows, 1, group.size)[group.rank])
    all_gather(group, 0)  # only then may a block be run
    found = []
    for block in model.layout.blocks:
        linears = block.linears[2:] if block.index == 1 else block.linears
        names = tuple((linear.name, linear.disk_name) for linear in linears)
        learning = Learning(0.6, 2, 5.0, 0.3)
        found.append(worker.learn_block(LearnTask(block.index, block.tensors, names, learning, samples)))
    return found, [loss.nats for loss in worker.losses()], worker.scratch_bytes()


@pytest.fixture(scope="module")
def opened(llama: Path) -> Model:
    return open_model(llama, "cpu", "float32", False)


def test_what_is_learnt_does_not_depend_on_workers_or_on_where_states_are_parked(opened: Model, run_group: Any) -> None:
    ((found, losses, _),) = run_group(1, lambda group: learned(opened, group=group))  # threads as of the others
    assert [len(shares) for shares in found] == [7, 5, 7]
    assert sum(len(set(shares)) > 1 for shares in found) >= 2, "of random blocks one may keep the same for all"
    (parked,) = run_group(1, lambda group: learned(opened, "disk", group))
    assert parked[:2] == (found, losses)
    page, states = 4096, 24 * 64 * 4
    assert parked[2] <= 2 * len(WINDOWS) * -(-states // page) * page, "two hidden states of each sample, no more"
    for workers in (2, 3):
        results = run_group(workers, lambda group: learned(opened, group=group))
        assert all(shares == found for shares, _, _ in results)
        assert [nats for _, own, _ in results for nats in own] == losses
    results = run_group(2, lambda group: learned(opened, group=group, samples=1))  # one worker has no sample
    assert results[0][0] == results[1][0]


def test_weights_that_are_stored_transposed_are_learnt_of(make_model: Any) -> None:
    model = open_model(make_model("gpt2", torch.float32, **FAMILIES["gpt2"]), "cpu", "float32", False)
    worker = BlockWorker(model.worker_setup(1, dense_stream=True), Alone())
    worker.start(model.layout.stem, [Sample(number, tuple(window)) for number, window in enumerate(WINDOWS)])
    block = model.layout.blocks[0]
    names = tuple((linear.name, linear.disk_name) for linear in block.linears)
    found = worker.learn_block(LearnTask(0, block.tensors, names, Learning(0.6, 2, 5.0, 0.3), len(WINDOWS)))
    assert mean(found, [shape[0] * shape[1] for shape in (each.shape for each in block.linears)]) == pytest.approx(0.6)
    assert len(set(found)) > 1
