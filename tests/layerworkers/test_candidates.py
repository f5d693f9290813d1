"""Candidates that are tried together: against models that are changed and run one by one."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES

from billhook.layerworkers.candidates import Branch, Perturb, Prune, perturbed
from billhook.layerworkers.collective import Alone, all_gather
from billhook.layerworkers.errors import BudgetError
from billhook.layerworkers.tasks import Sample
from billhook.layerworkers.worker import BlockWorker
from billhook.orchestrator import InputError, allocate
from billhook.orchestrator.allocation.contract import Candidate
from billhook.orchestrator.calibration import Windows, deal_samples
from billhook.orchestrator.events import no_progress
from billhook.orchestrator.model import Model, open_model
from billhook.orchestrator.placing import Arrangement
from billhook.orchestrator.recipe import read_options
from billhook.orchestrator.request import make_request
from billhook.orchestrator.trying import Trial, arranged_for, carried, most_streams, split

WINDOWS = torch.randint(0, 500, (3, 24), generator=torch.Generator().manual_seed(3)).tolist()

ONE_AT_A_TIME = threading.Lock()
"""Modules on the meta device are made by switching a device that all threads share."""

CANDIDATES: list[Candidate] = [
    {},
    {0: Prune(0.5), 1: Prune(0.5), 2: Prune(0.5)},
    {0: Prune(0.5), 1: Prune(0.7)},
    {1: Perturb(0.01, 5)},
    {1: Perturb(-0.01, 5)},
    {},
]


def tried(model: Model, candidates: list[Candidate], activations: str = "device", group: Any = None) -> Any:
    """What a worker makes of candidates: deviations, and losses of its samples."""
    group = Alone() if group is None else group
    windows = Windows(tuple(tuple(window) for window in WINDOWS), "")
    with ONE_AT_A_TIME:
        worker = BlockWorker(model.worker_setup(1, activations), group)
        worker.start(model.layout.stem, deal_samples(windows, 1, group.size)[group.rank])
    all_gather(group, 0)  # only then may a block be run
    linears = [block.linears for block in model.layout.blocks]
    found = carried(worker, model.layout.blocks, linears, candidates, len(WINDOWS), no_progress)
    losses = worker.candidate_losses()
    return found.deviations, [[each.nats for each in losses[stream]] for stream in found.stream_of]


@pytest.fixture(scope="module")
def opened(llama: Path) -> Model:
    return open_model(llama, "cpu", "float32", False)


def linear_modules(block: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    return {name: module for name, module in block.named_modules() if isinstance(module, torch.nn.Linear)}


def norms_of(block: torch.nn.Module, states: list[torch.Tensor], model: Any) -> tuple[dict[str, Any], list[Any]]:
    """2-norms of what enters each linear, and the block's outputs."""
    squares: dict[str, Any] = {}
    handles = [
        module.register_forward_pre_hook(
            lambda _, given, name=name: squares.update(
                {name: squares.get(name, 0) + given[0].double().square().sum(dim=(0, 1))}
            )
        )
        for name, module in linear_modules(block).items()
    ]
    outputs = []
    for hidden in states:
        positions = torch.arange(hidden.shape[1])[None]
        outputs.append(
            block(hidden, position_embeddings=model.model.rotary_emb(hidden, positions), attention_mask=None)
        )
    for handle in handles:
        handle.remove()
    return {name: square.sqrt() for name, square in squares.items()}, outputs


def by_hand(folder: Path, candidate: Candidate) -> tuple[list[float], list[float]]:
    """Deviations and losses of one candidate, from the model as transformers has it, block by block."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    deviations = []
    with torch.no_grad():
        states = [model.model.embed_tokens(torch.tensor([window])) for window in WINDOWS]
        for index, block in enumerate(model.model.layers):
            change = candidate.get(index)
            before, _ = norms_of(block, states, model)
            for number, (name, module) in enumerate(linear_modules(block).items()):
                if isinstance(change, Prune):
                    scores = module.weight.abs() * before[name].float()
                    gone = scores.argsort(dim=1, stable=True)[:, : int(change.sparsity * scores.shape[1])]
                    module.weight.scatter_(1, gone, 0.0)
                elif isinstance(change, Perturb):
                    module.weight.copy_(perturbed(module.weight, change, number))
            after, states = norms_of(block, states, model)
            shares = [(before[name] / before[name].sum(), after[name] / after[name].sum()) for name in before]
            distance = sum(float((a - b).norm()) / len(a) for a, b in shares)
            deviations.append(distance if isinstance(change, Prune) else 0.0)
        losses = [
            torch.nn.functional.cross_entropy(model.lm_head(model.model.norm(hidden))[0, :-1], torch.tensor(window[1:]))
            for hidden, window in zip(states, WINDOWS, strict=True)
        ]
    return deviations, [float(loss) for loss in losses]


def test_candidates_together_are_what_each_would_be_alone(llama: Path, opened: Model) -> None:
    deviations, losses = tried(opened, CANDIDATES)
    for number, candidate in enumerate(CANDIDATES):
        expected_deviations, expected_losses = by_hand(llama, candidate)
        assert deviations[number] == pytest.approx(expected_deviations, rel=1e-3, abs=1e-9)
        assert losses[number] == pytest.approx(expected_losses, rel=1e-4)
    assert len({tuple(each) for each in losses}) == len(CANDIDATES) - 1, "the first and the last are alike"


@pytest.mark.parametrize("family", ["mixtral", "gpt2"])
def test_experts_and_transposed_weights_are_changed_and_restored(make_model: Any, family: str) -> None:
    model = open_model(make_model(family, torch.float32, **FAMILIES[family]), "cpu", "float32", False)
    candidates: list[Candidate] = [{}, {0: Prune(0.6)}, {0: Prune(0.0)}, {}]
    deviations, losses = tried(model, candidates)
    assert deviations[0] == deviations[2] == [0.0] * len(model.layout.blocks)
    assert deviations[1][0] > 0
    assert losses[0] == losses[2] == losses[3]
    assert losses[1] != losses[0]
    worker = BlockWorker(model.worker_setup(1), Alone())
    worker.start(model.layout.stem, [Sample(number, tuple(window)) for number, window in enumerate(WINDOWS)])
    for block in model.layout.blocks:
        worker.forward_block(block.index, block.tensors)
    assert [each.nats for each in worker.losses()] == losses[0]


def test_what_is_found_does_not_depend_on_workers_or_on_where_states_are_parked(opened: Model, run_group: Any) -> None:
    alone = tried(opened, CANDIDATES)
    assert tried(opened, CANDIDATES, "disk") == alone
    for workers in (2, 4):  # of four workers one has no sample
        results = run_group(workers, lambda group: tried(opened, CANDIDATES, group=group))
        assert all(deviations == alone[0] for deviations, _ in results)
        together = [[nats for own in each for nats in own] for each in zip(*(own for _, own in results), strict=True)]
        assert together == alone[1]


def test_candidates_are_one_stream_for_as_long_as_they_are_alike() -> None:
    branches, stream_of = split(CANDIDATES, 0, [0] * 6)
    assert branches == [Branch(0, None), Branch(0, Prune(0.5))]
    assert stream_of == [0, 1, 1, 0, 0, 0]
    branches, stream_of = split(CANDIDATES, 1, stream_of)
    assert [branch.parent for branch in branches] == [0, 0, 0, 1, 1]
    assert stream_of == [0, 3, 4, 1, 2, 0]
    assert most_streams(CANDIDATES, 3) == 5
    assert most_streams([{}, {}], 3) == 1


def test_hidden_states_of_all_candidates_are_planned_with_and_parked_where_they_do_not_fit(llama: Path) -> None:
    options: Any = {"method": "wanda", "sparsity": 0.6, "samples": 8, "seqlen": 64, "dtype": "float32", "workers": 1}
    streams, states = 4000, 4000 * 8 * 64 * 64 * 4

    def arranged(streams: int, ram: str) -> Arrangement:
        recipe, resources = read_options(None, {**options, "ram": ram})
        windows = Windows(((1, 2),) * 8, "")
        trial = Trial(make_request(llama, recipe), resources, windows, Path("."))
        return arranged_for(trial, streams, [1])

    one, many = arranged(1, "100GiB"), arranged(streams, "100GiB")
    assert many.activations == "device"
    assert many.peak.ram - one.peak.ram >= states * (streams - 1) // streams - (8 << 20)
    parked = arranged(streams, f"{(one.peak.ram >> 20) + 200}MiB")
    assert parked.activations == "disk"
    assert parked.peak.disk >= states


def test_candidates_that_fit_no_budget_are_refused(llama: Path, text_file: Path, tmp_path: Path) -> None:
    options: Any = {"calibration": str(text_file), "samples": 8, "seqlen": 64, "method": "wanda", "sparsity": 0.6}
    with pytest.raises(BudgetError, match=r"--allocation neuronal: carries up to 14 candidates .* 8 samples .*--ram"):
        allocate(llama, tmp_path / "table.json", allocation="neuronal", ram="100MiB", **options)
    with pytest.raises(InputError, match=r"neuronal looks at calibration samples, which --method magnitude"):
        allocate(llama, tmp_path / "table.json", allocation="neuronal", method="magnitude")
    with pytest.raises(InputError, match=r"samples=0: expected at least 1"):
        allocate(llama, tmp_path / "table.json", allocation="neuronal", allocation_options={"samples": 0}, **options)
    assert not list(tmp_path.iterdir())
