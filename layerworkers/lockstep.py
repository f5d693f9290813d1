"""Run all calibration samples through one block at the same time, stopping them together at each linear's input.

Each sample runs the unmodified block in a greenlet of its own. When all have stood before the linears of an input
group, the group is solved and its sparse weights are put into the block; then all go on. So every linear is fitted to
inputs that already went through the sparse linears before it, in one forward pass. Groups of one stage, such as those
of several experts, are passed one after the other, and solved together.

What the waiting samples hold can be kept in three ways, which give the same bits:

- ``hold``: where it is;
- ``spill``: parked, and brought back when the sample goes on;
- ``replay``: not at all; each sample runs again from the block's input to the next stop, one at a time.

Beside them a dense stream may run: the same samples, as the dense model would carry them, through the dense block,
which stops at the same linears. What enters a linear is then told together with how it deviates from the dense stream.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, MutableSequence, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_leaves

from billhook.layerworkers.block_facts import Arguments, InputGroup
from billhook.layerworkers.experts import Experts
from billhook.layerworkers.live import LiveTensors, ParkedTensors
from billhook.layerworkers.scratch import Parking
from billhook.layerworkers.stages import Stage

Arriving = Iterator[tuple[int, InputGroup, Tensor, Tensor | None]]
"""(position of the sample, group, its input [..., C], how it deviates) as the samples pass a stage.

An input lasts until the next. What deviates [..., K] is there where a dense stream runs beside: see :func:`_deviation`.
"""

OnStage = Callable[[Stage, Arriving], None]


@dataclass(frozen=True)
class DenseStream:
    """The samples as the dense model would carry them; experts are passed, but told nothing of."""

    block: nn.Module
    """The dense block; a copy of its own."""
    inputs: MutableSequence[Tensor]
    """One hidden state per sample; each is replaced by the dense block's output for it."""


@torch.inference_mode()
def run_lockstep(
    block: nn.Module,
    stages: Sequence[Stage],
    inputs: MutableSequence[Tensor],
    arguments: Arguments | None,
    on_stage: OnStage,
    keep: str = "hold",
    parking: Parking | None = None,
    dense: DenseStream | None = None,
) -> None:
    """Replace each of ``inputs`` by the block's output for it, pausing all of them at every stage.

    stages: groups of linears that share one input tensor, in execution order.
    inputs: one hidden state per sample, [1, T, H]; may be empty (a worker without samples still solves).
    arguments: the block's other arguments, the same for every sample; None only when there are no samples.
    on_stage: called with each stage and the inputs of its groups, before any linear of it runs; it must take them all.
    keep: ``hold``, ``spill`` (to ``parking``) or ``replay``. dense: what runs beside, if anything.

    The outputs are bit-equal to those of the plain forward with the final weights.
    """
    samples = _PausedSamples(block, stages, inputs, arguments, keep == "replay")
    beside: _PausedSamples | None = None
    try:
        if dense is not None:
            shown = [stage for stage in stages if not stage[0].experts]
            beside = _PausedSamples(dense.block, shown, dense.inputs, arguments, keep == "replay")
        for stage in stages:
            arriving = _arriving(block, samples, None if stage[0].experts else beside, stage, keep, parking)
            on_stage(stage, arriving)
            assert next(arriving, None) is None, f"not every sample's input of {stage[0].stop} was taken"
        for each in (samples, beside):
            if each is not None:
                each.leave()
    finally:
        for each in (samples, beside):
            if each is not None:
                each.close()


def _arriving(
    block: nn.Module,
    samples: _PausedSamples,
    beside: _PausedSamples | None,
    stage: Stage,
    keep: str,
    parking: Parking | None,
) -> Arriving:
    """Yield what comes to a stage, each sample's with how it deviates from the same sample of the dense stream."""
    own, *others = (
        each.replay_to(stage) if keep == "replay" else each.go_on_to(stage, parking if keep == "spill" else None)
        for each in (samples, beside)
        if each is not None
    )
    if not others:
        for arrived in own:
            yield arrived.position, arrived.group, arrived.x, None
        return
    for arrived, dense in zip(own, others[0], strict=True):
        yield arrived.position, arrived.group, arrived.x, _deviation(block, arrived, dense)


def _deviation(block: nn.Module, arrived: _Arrival, dense: _Arrival) -> Tensor:
    """Return by how much the dense stream is ahead, in the compute dtype.

    Of the input [..., C]; where it is known to what the output of the only linear is added, of that sum [..., R], both
    inputs being multiplied by the dense weight.
    """
    ahead = dense.x - arrived.x
    if arrived.residual is None or dense.residual is None:
        return ahead
    (name,) = arrived.group.linears
    weight: Any = block.get_submodule(name).weight
    return functional.linear(ahead, weight) + (dense.residual - arrived.residual)


@dataclass(frozen=True)
class _Arrival:
    """A sample that stands before a group."""

    position: int
    group: InputGroup
    x: Tensor
    residual: Tensor | None
    """What the output of the group's linear will be added to."""


class _PausedSamples:
    """The samples of one block, each in a greenlet that stops where the groups do."""

    def __init__(
        self,
        block: nn.Module,
        stages: Sequence[Stage],
        inputs: MutableSequence[Tensor],
        arguments: Arguments | None,
        again: bool,
    ):
        """again: each input is needed more than once, so that no block may change it."""
        self._again = again
        self._block, self._inputs, self._arguments = block, inputs, arguments
        self._hub = getcurrent()
        groups = [group for stage in stages for group in stage]
        self._stop_of = stops_of(block, groups)
        self._shown: dict[str, weakref.ref[Tensor]] = {}
        self._shown_by_sample: list[dict[str, weakref.ref[Tensor]]] = [{} for _ in inputs]
        self._wanted = ""
        self._threads: list[greenlet | None] = [None] * len(inputs)
        self._live = [LiveTensors() for _ in inputs]
        self._parked: list[ParkedTensors | None] = [None] * len(inputs)
        self._handles = [
            block.get_submodule(name).register_forward_pre_hook(
                # A hook that returned what `switch` returns would replace the linear's input.
                lambda _module, given, name=name: self._pause(name, given[0])
            )
            for name in self._stop_of
        ]
        self._handles += [
            block.get_submodule(name).register_forward_pre_hook(
                lambda _module, given, named, name=name: self._note(name, first_of(given, named)), with_kwargs=True
            )
            for name in {group.residual for group in groups if group.residual}
        ]

    def go_on_to(self, stage: Stage, parking: Parking | None) -> Iterator[_Arrival]:
        """Let each sample go on from where it stands through ``stage``, and park what it holds, given a parking."""
        for number in range(len(self._threads)):
            for group in stage:
                watching = self._live[number].watching() if parking else nullcontext()
                yield self._arrive(number, group, watching)
            if parking is not None:
                self._parked[number] = ParkedTensors(self._own(number), parking)

    def replay_to(self, stage: Stage) -> Iterator[_Arrival]:
        """Run each sample from the block's input through ``stage``, and forget it again."""
        for number in range(len(self._threads)):
            for group in stage:
                yield self._arrive(number, group, nullcontext())
            self._stop(number)

    def leave(self) -> None:
        """Let every sample run to the block's end."""
        for number in range(len(self._threads)):
            self._resume(number, "", nullcontext())

    def close(self) -> None:
        """Forget all samples and remove the hooks."""
        for handle in self._handles:
            handle.remove()
        for number in range(len(self._threads)):
            self._stop(number)

    def _arrive(self, number: int, group: InputGroup, watching: AbstractContextManager[Any]) -> _Arrival:
        x = self._resume(number, group.stop, watching)
        residual = self._shown[group.residual]() if group.residual else None
        assert not group.residual or residual is not None, f"what {group.stop} is added to is gone"
        return _Arrival(number, group, x, residual)

    def _resume(self, number: int, wanted: str, watching: AbstractContextManager[Any]) -> Any:
        """Run one sample until it stands before ``wanted``; return the input there."""
        if (parked := self._parked[number]) is not None:
            parked.restore()
            self._parked[number] = None
        thread = self._threads[number]
        if thread is None:
            thread = self._threads[number] = greenlet(self._run)
        self._wanted, self._shown = wanted, self._shown_by_sample[number]
        with watching:
            stopped = thread.switch(number) if not thread else thread.switch()
        if not wanted:
            assert thread.dead, f"sample {number} met more linears than the block has"
            return None
        assert isinstance(stopped, Tensor), f"sample {number} left the block before {wanted}"
        return stopped

    def _own(self, number: int) -> list[Tensor]:
        """Return what one sample alone holds: not weights, buffers, arguments, or what a module keeps for later."""
        kept = [tensor for tensor in tree_leaves(self._arguments) if isinstance(tensor, Tensor)]
        for module in self._block.modules():
            for values in (module._parameters, module._buffers, vars(module)):
                kept += [value for value in values.values() if isinstance(value, Tensor)]
        shared = {tensor.untyped_storage()._cdata for tensor in kept}
        return [each for each in self._live[number].tensors() if each.untyped_storage()._cdata not in shared]

    def _run(self, number: int) -> None:
        assert self._arguments is not None
        args, kwargs = self._arguments
        hidden = self._inputs[number].clone() if self._again else self._inputs[number]
        self._live[number].note(hidden)
        self._inputs[number] = output_of(self._block(hidden, *args, **kwargs))

    def _pause(self, name: str, x: Tensor) -> None:
        """Run in a sample's greenlet: where a group stops it waits, the group's other linears must share the input."""
        stop = self._stop_of[name]
        if stop == name:
            self._shown[name] = weakref.ref(x)
            if name == self._wanted:
                self._hub.switch(x)
        else:
            assert self._shown[stop]() is x, f"{name} does not see the input of {stop}"

    def _note(self, name: str, x: Tensor) -> None:
        """Run in a sample's greenlet: remember what a linear's output will be added to, which keeps it alive."""
        self._shown[name] = weakref.ref(x)

    def _stop(self, number: int) -> None:
        thread, self._threads[number] = self._threads[number], None
        if thread:
            thread.throw()


@torch.inference_mode()
def run_plain(block: nn.Module, inputs: MutableSequence[Tensor], arguments: Arguments | None) -> None:
    """Replace each of ``inputs`` by the block's output for it: the forward pass without any pause."""
    for sample, hidden in enumerate(inputs):
        assert arguments is not None
        args, kwargs = arguments
        inputs[sample] = output_of(block(hidden, *args, **kwargs))


class _AllSeen(BaseException):
    """Raised in a block to leave it once nothing more of it is wanted; no block may catch it."""


@torch.inference_mode()
def run_observed(
    block: nn.Module,
    groups: Sequence[InputGroup],
    inputs: Sequence[Tensor],
    arguments: Arguments | None,
    on_input: Callable[[int, InputGroup, Tensor], None],
) -> None:
    """Run the block as it is on every sample for the sake of what enters its linears, as far as the last of these.

    on_input: called with the sample's position, the group, and its input [..., C].
    """
    group_at = {group.stop: group for group in groups}
    stop_of = stops_of(block, groups)
    current = 0
    shown: dict[str, weakref.ref[Tensor]] = {}
    expected: set[str] = set()

    def observe(name: str, x: Tensor) -> None:
        stop = stop_of[name]
        if stop == name:
            shown[name] = weakref.ref(x)
            on_input(current, group_at[name], x)
        else:
            assert shown[stop]() is x, f"{name} does not see the input of {stop}"
        expected.discard(name)
        if not expected:
            raise _AllSeen

    handles = [
        block.get_submodule(name).register_forward_pre_hook(lambda _module, given, name=name: observe(name, given[0]))
        for name in stop_of
    ]
    try:
        for current in range(len(inputs)):
            assert arguments is not None
            args, kwargs = arguments
            expected |= set(stop_of)
            with suppress(_AllSeen):
                block(inputs[current].clone(), *args, **kwargs)  # the input is needed again
            assert not expected, f"sample {current} left the block before {', '.join(sorted(expected))}"
    finally:
        for handle in handles:
            handle.remove()


def stops_of(block: nn.Module, groups: Sequence[InputGroup]) -> dict[str, str]:
    """Return where each group stops: by that module's name, and by those of its linears that can be told to see it.

    An expert may show another input than it computes with; see :class:`billhook.layerworkers.experts.Experts`.
    """
    inside = tuple(f"{path}." for path, module in block.named_modules() if isinstance(module, Experts))
    return {
        name: group.stop
        for group in groups
        for name in (group.stop, *(each for each in group.linears if not each.startswith(inside)))
    }


def first_of(given: Sequence[Any], named: Mapping[str, Any]) -> Any:
    """Return the first of a module's positional and keyword arguments."""
    return next(iter((*given, *named.values())))


def output_of(result: Any) -> Tensor:
    """Return the hidden state of what a block returned: some families return a tuple."""
    hidden = result[0] if isinstance(result, tuple) else result
    assert isinstance(hidden, Tensor)
    return hidden
