from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES

from billhook.layerworkers.block_facts import Arguments, InputGroup
from billhook.layerworkers.lockstep import Arriving, DenseStream, run_lockstep, run_observed, run_plain
from billhook.layerworkers.scratch import DiskParking
from billhook.layerworkers.skeleton import Skeleton
from billhook.layerworkers.stages import Stage, in_stages
from billhook.orchestrator.model import open_model


def loaded(folder: Path, index: int) -> tuple[Skeleton, list[torch.Tensor], Arguments]:
    """The skeleton with block ``index`` loaded, three samples' inputs and the block's arguments."""
    from billhook.layerworkers.shards import read_tensor

    model = open_model(folder, "cpu", "auto", False)
    skeleton = Skeleton(
        folder, getattr(torch, model.dtype), torch.device("cpu"), separate_experts=model.separate_experts
    )
    for tensor in [*model.layout.stem.tensors, *model.layout.blocks[index].tensors]:
        skeleton.set_parameter(tensor.module_name, read_tensor(tensor.entry))
    embedding = read_tensor(model.layout.stem.embedding)
    torch.manual_seed(0)
    states, arguments = [], []
    for _ in range(3):
        hidden, own = skeleton.begin(torch.randint(0, 512, (24,)), lambda ids: embedding[ids].to(skeleton.dtype))
        states.append(hidden)
        arguments.append(own)
    return skeleton, states, arguments[0][index]


def stages_of(skeleton: Skeleton, index: int, at_once: int = 100) -> list[Stage]:
    groups = skeleton.facts(index).input_groups
    return in_stages(groups, {group.experts: at_once for group in groups})


@pytest.mark.parametrize("family", FAMILIES)
def test_lockstep_outputs_have_the_bits_of_the_plain_forward(make_model: Any, family: str) -> None:
    skeleton, states, arguments = loaded(make_model(family, **FAMILIES[family]), 1)
    block, groups = skeleton.blocks[1], skeleton.facts(1).input_groups
    plain, lockstep = list(states), list(states)
    run_plain(block, plain, arguments)
    seen: list[tuple[int, InputGroup]] = []
    run_lockstep(
        block,
        stages_of(skeleton, 1),
        lockstep,
        arguments,
        lambda stage, arriving: seen.extend((position, group) for position, group, _, _ in arriving),
    )
    assert all(torch.equal(a, b) for a, b in zip(plain, lockstep, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(plain, states, strict=True))
    assert len(groups) >= 3
    assert sorted(seen, key=lambda each: (each[0], str(each[1]))) == sorted(
        ((position, group) for group in groups for position in range(3)), key=lambda each: (each[0], str(each[1]))
    )


def test_a_weight_changed_at_a_pause_is_used_by_every_sample(llama: Path) -> None:
    skeleton, states, arguments = loaded(llama, 0)
    block: Any = skeleton.blocks[0]
    groups = skeleton.facts(0).input_groups
    assert tuple(group.linears for group in groups) == (
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    )
    inputs: dict[str, list[torch.Tensor]] = {}

    def halve(stage: Stage, arriving: Arriving) -> None:
        (group,) = stage
        inputs[group.stop] = [x.clone() for _, _, x, _ in arriving]
        for name in group.linears:
            block.get_submodule(name).weight.data.mul_(0.5)

    lockstep = list(states)
    run_lockstep(block, stages_of(skeleton, 0), lockstep, arguments, halve)
    plain = list(states)  # the weights are halved now: the plain forward with them must agree
    run_plain(block, plain, arguments)
    assert all(torch.equal(a, b) for a, b in zip(plain, lockstep, strict=True))
    with torch.inference_mode():
        assert torch.equal(inputs["self_attn.q_proj"][0], block.input_layernorm(states[0]))


@pytest.mark.parametrize("family", ["llama", "gemma2", "falcon", "qwen2_moe", "llama4_text"])
@pytest.mark.parametrize("keep", ["replay", "spill"])
def test_what_waits_elsewhere_or_is_computed_again_has_the_same_bits(
    make_model: Any, family: str, keep: str, tmp_path: Path
) -> None:
    results = []
    for way in ("hold", keep):
        skeleton, states, arguments = loaded(make_model(family, **FAMILIES[family]), 1)
        block: Any = skeleton.blocks[1]
        seen: list[torch.Tensor] = []

        def halve(
            stage: Stage,
            arriving: Arriving,
            seen: list[torch.Tensor] = seen,
            block: Any = block,
        ) -> None:
            seen += [x.clone() for _, _, x, _ in arriving]
            for group in stage:
                for name in group.linears:
                    block.get_submodule(name).weight.data.mul_(0.5)

        given = list(states)
        run_lockstep(block, stages_of(skeleton, 1), given, arguments, halve, way, DiskParking(str(tmp_path)))
        results.append([*given, *seen])
    assert len(results[0]) > 3 * 3
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("keep", ["hold", "spill", "replay"])
def test_a_dense_stream_is_the_dense_blocks_and_tells_how_far_it_is_ahead(
    llama: Path, keep: str, tmp_path: Path
) -> None:
    skeleton, states, arguments = loaded(llama, 0)
    block: Any = skeleton.blocks[0]
    untouched: Any = deepcopy(block)
    ahead = [state + 0.1 * torch.randn_like(state) for state in states]
    behind, dense = list(states), list(ahead)
    seen: dict[str, list[torch.Tensor]] = {}
    inputs: dict[str, list[torch.Tensor]] = {}

    def halve(stage: Stage, arriving: Arriving) -> None:
        (group,) = stage
        pairs = [(x.clone(), deviation) for _, _, x, deviation in arriving]
        inputs[group.stop] = [x for x, _ in pairs]
        seen[group.stop] = [deviation for _, deviation in pairs if deviation is not None]
        for name in group.linears:
            block.get_submodule(name).weight.data.mul_(0.5)

    stream = DenseStream(deepcopy(block), dense)
    run_lockstep(
        block, stages_of(skeleton, 0), behind, arguments, halve, keep, DiskParking(str(tmp_path)), dense=stream
    )
    plain, sparse = list(ahead), list(states)
    run_plain(untouched, plain, arguments)
    run_plain(block, sparse, arguments)
    assert all(torch.equal(a, b) for a, b in zip([*dense, *behind], [*plain, *sparse], strict=True))
    with torch.inference_mode():
        for sample, (x_dense, x) in enumerate(zip(ahead, states, strict=True)):
            norm = untouched.input_layernorm
            assert torch.equal(seen["self_attn.q_proj"][sample], norm(x_dense) - norm(x))
            args, kwargs = arguments
            last = untouched(x_dense, *args, **kwargs)
            last = last[0] if isinstance(last, tuple) else last
            # What the sparse block would give if its last linear were left dense.
            given = inputs["mlp.down_proj"][sample]
            dense_last = torch.nn.functional.linear(given, untouched.mlp.down_proj.weight)
            sparse_last = torch.nn.functional.linear(given, block.mlp.down_proj.weight)
            expected = last - (behind[sample] - sparse_last + dense_last)
            wrong = (seen["mlp.down_proj"][sample] - expected).float().norm()
            assert wrong < 0.02 * expected.float().norm()  # all of it is rounded to bfloat16 in between


@pytest.mark.parametrize(
    ("family", "residuals"),
    [
        ("llama", {"self_attn.o_proj": "input_layernorm", "mlp.down_proj": "post_attention_layernorm"}),
        ("gemma2", {}),  # norms come between the linears and the sums
        ("falcon", {}),  # attention and the rest are added to each other first
    ],
)
def test_what_an_output_is_added_to_is_found(make_model: Any, family: str, residuals: dict[str, str]) -> None:
    skeleton, _, _ = loaded(make_model(family, **FAMILIES[family]), 0)
    groups = skeleton.facts(0).input_groups
    assert {group.linears[0]: group.residual for group in groups if group.residual} == residuals


def test_spilling_gives_up_the_memory_of_all_that_waits(llama: Path, tmp_path: Path) -> None:
    skeleton, states, arguments = loaded(llama, 0)
    parking = DiskParking(str(tmp_path))
    held: list[int] = []

    def measure(stage: Stage, arriving: Arriving) -> None:
        last: list[torch.Tensor] = []
        for _, _, x, _ in arriving:
            held.extend(each.untyped_storage().nbytes() for each in last)
            last = [x]

    run_lockstep(skeleton.blocks[0], stages_of(skeleton, 0), list(states), arguments, measure, "spill", parking)
    assert held == [0] * 8
    # At each stop: the input of the linears, and the residual with what attention made, or with the gate's output.
    assert parking.peak_bytes >= 3 * 2 * 4096


def test_observing_changes_nothing_and_sees_what_the_plain_forward_gives(llama: Path) -> None:
    skeleton, states, arguments = loaded(llama, 0)
    block, groups = skeleton.blocks[0], skeleton.facts(0).input_groups
    observed: dict[InputGroup, list[torch.Tensor]] = {group: [] for group in groups}
    given = list(states)
    last: Any = block.get_submodule(groups[-1].linears[-1])
    ran = last.register_forward_hook(lambda *_: pytest.fail("nothing behind the last input is wanted"))
    run_observed(block, groups, given, arguments, lambda position, group, x: observed[group].append(x.clone()))
    ran.remove()
    assert all(a is b for a, b in zip(given, states, strict=True))
    paused: dict[InputGroup, list[torch.Tensor]] = {}

    def note(stage: Stage, arriving: Arriving) -> None:
        paused[stage[0]] = [x.clone() for _, _, x, _ in arriving]

    run_lockstep(block, stages_of(skeleton, 0), given, arguments, note)
    for group in groups:
        assert all(torch.equal(a, b) for a, b in zip(observed[group], paused[group], strict=True))


def test_a_worker_without_samples_still_meets_every_group(llama: Path) -> None:
    skeleton, _, _ = loaded(llama, 0)
    seen: list[int] = []
    run_lockstep(skeleton.blocks[0], stages_of(skeleton, 0), [], None, lambda g, x: seen.append(len(list(x))))
    assert seen == [0, 0, 0, 0]


def test_a_failure_in_the_solver_leaves_no_hook_behind(llama: Path) -> None:
    skeleton, states, arguments = loaded(llama, 0)

    def fail(stage: Stage, arriving: Arriving) -> None:
        next(arriving)
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        run_lockstep(skeleton.blocks[0], stages_of(skeleton, 0), list(states), arguments, fail)
    assert not any(module._forward_pre_hooks for module in skeleton.blocks[0].modules())


class _Inconsiderate(torch.nn.Module):
    """Changes its input in place, and keeps a tensor from its first call."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
        self.cached: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.cached is None:
            self.cached = torch.arange(8.0)
        x += 1
        return x + self.second(torch.relu(self.first(x * 2) + self.cached))


@pytest.mark.parametrize("keep", ["hold", "spill", "replay"])
def test_a_block_that_changes_its_input_or_keeps_a_tensor_computes_the_same(keep: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    block = _Inconsiderate()
    states = [torch.randn(1, 5, 8) for _ in range(3)]
    plain, given = [state.clone() for state in states], [state.clone() for state in states]
    groups = [InputGroup("first", ("first",)), InputGroup("second", ("second",))]
    run_observed(block, groups, [state.clone() for state in states], ((), {}), lambda *_: None)
    run_plain(block, plain, ((), {}))
    block.cached = None

    def take(stage: Stage, arriving: Arriving) -> None:
        assert len([x.shape for _, _, x, _ in arriving]) == 3

    run_lockstep(block, in_stages(groups, {}), given, ((), {}), take, keep, DiskParking(str(tmp_path)))
    assert all(torch.equal(a, b) for a, b in zip(plain, given, strict=True))
