"""Candidates that are tried together: against models that are changed and run one by one."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES

from billhook.layerworkers.candidates import (
    NO_DEVIATION,
    Branch,
    Deviation,
    Perturb,
    Prune,
    PruneRows,
    RowScores,
    perturbed,
)
from billhook.layerworkers.collective import Alone, all_gather
from billhook.layerworkers.errors import BudgetError
from billhook.layerworkers.row_shares import row_counts
from billhook.layerworkers.tasks import Sample
from billhook.layerworkers.worker import BlockWorker
from billhook.orchestrator import InputError, allocate
from billhook.orchestrator.allocation import ALLOCATORS, Allocation, Candidate, Evidence, Matrix, allocated
from billhook.orchestrator.allocation.outlets import outlets_of
from billhook.orchestrator.calibration import Windows, deal_samples
from billhook.orchestrator.events import no_progress
from billhook.orchestrator.model import Model, open_model
from billhook.orchestrator.passing import Load, Trial, arranged_for
from billhook.orchestrator.phases import changing
from billhook.orchestrator.placing import Arrangement
from billhook.orchestrator.recipe import read_options
from billhook.orchestrator.request import make_request
from billhook.orchestrator.trying import carried, most_streams, split

WINDOWS = torch.randint(0, 500, (3, 24), generator=torch.Generator().manual_seed(3)).tolist()

ONE_AT_A_TIME = threading.Lock()
"""Modules on the meta device are made by switching a device that all threads share."""

SCORES = RowScores(
    {
        f"model.layers.1.{name}.weight": np.random.default_rng(rows).normal(size=rows).astype(np.float32)
        for name, rows in (("self_attn.o_proj", 64), ("mlp.up_proj", 144))
    }
)

CANDIDATES: list[Candidate] = [
    {},
    {0: Prune(0.5), 1: Prune(0.5), 2: Prune(0.5)},
    {0: Prune(0.5), 1: Prune(0.7)},
    {1: Perturb(0.01, 5)},
    {1: Perturb(-0.01, 5)},
    {0: Prune(0.5), 1: PruneRows(0.7, 0.2, SCORES)},
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
    blocks = list(carried(worker, model.layout.blocks, linears, candidates, len(WINDOWS), no_progress))
    losses = worker.candidate_losses()
    deviations = [
        [block.deviations[block.stream_of[number]] for block in blocks] for number, _ in enumerate(candidates)
    ]
    return deviations, [[each.nats for each in losses[stream]] for stream in blocks[-1].stream_of]


def told(deviations: Sequence[Sequence[Deviation]]) -> list[Any]:
    """All that deviations tell, to compare it."""
    return [
        [(each.distance, {name: x.tolist() for name, x in each.shrinkage.items()}) for each in own]
        for own in deviations
    ]


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


def by_hand(folder: Path, candidate: Candidate) -> tuple[list[Any], list[float]]:
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
                if isinstance(change, Prune | PruneRows):
                    scores = module.weight.abs() * before[name].float()
                    rows, columns = scores.shape
                    counts = np.full(rows, int(change.sparsity * columns))
                    own = SCORES.of.get(f"model.layers.{index}.{name}.weight")
                    if isinstance(change, PruneRows) and own is not None:
                        counts = row_counts(own, columns, int(counts.sum()), change.spread)
                        assert np.ptp(counts) > 10
                    for row, gone in enumerate(scores.argsort(dim=1, stable=True)):
                        module.weight[row, gone[: counts[row]]] = 0.0
                elif isinstance(change, Perturb):
                    module.weight.copy_(perturbed(module.weight, change, number))
            after, states = norms_of(block, states, model)
            shares = [(before[name] / before[name].sum(), after[name] / after[name].sum()) for name in before]
            distance = sum(float((a - b).norm()) / len(a) for a, b in shares)
            shrinkage = {
                f"model.layers.{index}.{name}.weight": before[name] - after[name]
                for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
            }
            pruned = isinstance(change, Prune | PruneRows)
            deviations.append(Deviation(distance, shrinkage) if pruned else NO_DEVIATION)
        losses = [
            torch.nn.functional.cross_entropy(model.lm_head(model.model.norm(hidden))[0, :-1], torch.tensor(window[1:]))
            for hidden, window in zip(states, WINDOWS, strict=True)
        ]
    return deviations, [float(loss) for loss in losses]


def test_candidates_together_are_what_each_would_be_alone(llama: Path, opened: Model) -> None:
    deviations, losses = tried(opened, CANDIDATES)
    for number, candidate in enumerate(CANDIDATES):
        expected_deviations, expected_losses = by_hand(llama, candidate)
        for found, expected in zip(deviations[number], expected_deviations, strict=True):
            assert found.distance == pytest.approx(expected.distance, rel=1e-3, abs=1e-9)
            assert found.shrinkage.keys() == expected.shrinkage.keys()
            for name, shrunk in expected.shrinkage.items():
                assert found.shrinkage[name] == pytest.approx(shrunk.numpy(), rel=1e-3, abs=1e-4)
        assert losses[number] == pytest.approx(expected_losses, rel=1e-4)
    assert len({tuple(each) for each in losses}) == len(CANDIDATES) - 1, "the first and the last are alike"


@pytest.mark.parametrize("family", ["mixtral", "gpt2"])
def test_experts_and_transposed_weights_are_changed_and_restored(make_model: Any, family: str) -> None:
    model = open_model(make_model(family, torch.float32, **FAMILIES[family]), "cpu", "float32", False)
    candidates: list[Candidate] = [{}, {0: Prune(0.6)}, {0: Prune(0.0)}, {}]
    deviations, losses = tried(model, candidates)
    assert [each.distance for each in (*deviations[0], *deviations[2])] == [0.0] * 2 * len(model.layout.blocks)
    assert deviations[1][0].distance > 0
    assert losses[0] == losses[2] == losses[3]
    assert losses[1] != losses[0]
    worker = BlockWorker(model.worker_setup(1), Alone())
    worker.start(model.layout.stem, [Sample(number, tuple(window)) for number, window in enumerate(WINDOWS)])
    for block in model.layout.blocks:
        worker.forward_block(block.index, block.tensors)
    assert [each.nats for each in worker.losses()] == losses[0]


def test_what_is_found_does_not_depend_on_workers_or_on_where_states_are_parked(opened: Model, run_group: Any) -> None:
    deviations, losses = tried(opened, CANDIDATES)
    again = tried(opened, CANDIDATES, "disk")
    assert (told(again[0]), again[1]) == (told(deviations), losses)
    for workers in (2, 4):  # of four workers one has no sample
        results = run_group(workers, lambda group: tried(opened, CANDIDATES, group=group))
        assert all(told(own) == told(deviations) for own, _ in results)
        together = [[nats for own in each for nats in own] for each in zip(*(own for _, own in results), strict=True)]
        assert together == losses


def test_rows_that_are_not_spread_lose_the_same(opened: Model) -> None:
    candidates: list[Candidate] = [{1: Prune(0.7)}, {1: PruneRows(0.7, 0.0, SCORES)}, {1: PruneRows(0.7, 0.1, SCORES)}]
    deviations, losses = tried(opened, candidates)
    assert told(deviations)[0] == told(deviations)[1] != told(deviations)[2]
    assert losses[0] == losses[1] != losses[2]


def test_neuronal_makes_the_same_table_whatever_the_number_of_workers(opened: Model, run_group: Any) -> None:
    """Both steps, with the deviations that workers find."""
    blocks = opened.layout.blocks
    linears = [linear for block in blocks for linear in block.linears]
    matrices = [Matrix(linear.disk_name, *linear.shape, linear.shape[0]) for linear in linears]
    outlets = [outlet for block in blocks for outlet in outlets_of(block.linears, block.groups, 4, 2)]

    def unknown(*_: object) -> Any:
        raise AssertionError

    def table(group: Any) -> Allocation:
        evidence = Evidence(
            *(matrices, unknown, unknown, unknown, [block.index for block in blocks for _ in block.linears]),
            *(lambda candidates, samples: tried(opened, candidates, group=group)[0], unknown, unknown),
            outlets=outlets,
        )
        return allocated("neuronal", ALLOCATORS["neuronal"].options(), evidence, Fraction(7, 10))

    one = table(Alone())
    assert set(one.by_row) == {
        f"model.layers.{block}.{name}.weight"
        for block in range(2)
        for name in (*(f"self_attn.{each}_proj" for each in "qkvo"), "mlp.gate_proj", "mlp.up_proj")
    }
    assert all(sum(counts) == one.removed[name] for name, counts in one.by_row.items())
    for workers in (2, 3):
        assert run_group(workers, table) == [one] * workers


def test_candidates_are_one_stream_for_as_long_as_they_are_alike() -> None:
    branches, stream_of = split(CANDIDATES, 0, [0] * len(CANDIDATES))
    assert branches == [Branch(0, None), Branch(0, Prune(0.5))]
    assert stream_of == [0, 1, 1, 0, 0, 1, 0]
    branches, stream_of = split(CANDIDATES, 1, stream_of)
    assert [branch.parent for branch in branches] == [0, 0, 0, 1, 1, 1]
    assert stream_of == [0, 3, 4, 1, 2, 5, 0]
    assert most_streams(CANDIDATES, 3) == 6
    assert most_streams([{}, {}], 3) == 1


def test_hidden_states_of_all_candidates_are_planned_with_and_parked_where_they_do_not_fit(llama: Path) -> None:
    options: Any = {"method": "wanda", "sparsity": 0.6, "samples": 8, "seqlen": 64, "dtype": "float32", "workers": 1}
    streams, states = 4000, 4000 * 8 * 64 * 64 * 4

    def arranged(streams: int, ram: str) -> Arrangement:
        recipe, resources = read_options(None, {**options, "ram": ram})
        windows = Windows(((1, 2),) * 8, "")
        trial = Trial(make_request(llama, recipe), resources, windows, Path("."))
        return arranged_for(trial, Load(streams, changing, ""), [1])

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
