"""Run all calibration samples through one block at the same time, stopping them together at each linear's input.

Each sample runs the unmodified block in a greenlet of its own. When all stand before the linears of an input group,
the group is solved and its sparse weights are put into the block; then all go on. So every linear is fitted to inputs
that already went through the sparse linears before it, in one forward pass.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from billhook.layerworkers.skeleton import Arguments

OnGroup = Callable[[tuple[str, ...], list[Tensor]], None]


@torch.inference_mode()
def run_lockstep(
    block: nn.Module,
    groups: Sequence[tuple[str, ...]],
    inputs: list[Tensor],
    arguments: Arguments | None,
    on_group: OnGroup,
) -> None:
    """Replace each of ``inputs`` by the block's output for it, pausing all of them at every group of linears.

    groups: names of linears within the block that share one input tensor, in execution order.
    inputs: one hidden state per sample, [1, T, H]; may be empty (a worker without samples still solves).
    arguments: the block's other arguments, the same for every sample; None only when there are no samples.
    on_group: called with each group and its input per sample, [1, T, C], before any linear of it runs.

    The outputs are bit-equal to those of the plain forward with the final weights.
    """
    hub = getcurrent()
    leader_of = {name: group[0] for group in groups for name in group}
    leader_input: list[dict[str, weakref.ref[Tensor]]] = [{} for _ in inputs]
    running = 0

    def pause(name: str, x: Tensor) -> None:
        """Run in a sample's greenlet, before a linear: the first of a group waits, the others must share its input."""
        if leader_of[name] == name:
            leader_input[running][name] = weakref.ref(x)
            hub.switch((name, x))
        else:
            assert leader_input[running][leader_of[name]]() is x, f"{name} does not see the input of {leader_of[name]}"

    def run() -> None:
        assert arguments is not None
        args, kwargs = arguments
        sample = running
        inputs[sample] = output_of(block(inputs[sample], *args, **kwargs))

    samples = [greenlet(run) for _ in inputs]
    handles = [
        block.get_submodule(name).register_forward_pre_hook(
            # A hook that returned what `switch` returns would replace the linear's input.
            lambda _module, given, name=name: pause(name, given[0])
        )
        for name in leader_of
    ]
    try:
        for group in groups:
            stopped = []
            for running, thread in enumerate(samples):
                stopped.append(_expect(thread.switch(), running, group[0]))
            on_group(group, stopped)
            del stopped
        for running, thread in enumerate(samples):
            thread.switch()
            assert thread.dead, f"sample {running} met more linears than the block has"
    finally:
        for handle in handles:
            handle.remove()
        for thread in samples:
            if thread:
                thread.throw()


def _expect(stopped: Any, sample: int, leader: str) -> Tensor:
    assert isinstance(stopped, tuple), f"sample {sample} left the block before {leader}"
    name, x = stopped
    assert name == leader, f"sample {sample} stopped at {name}, expected {leader}"
    assert isinstance(x, Tensor)
    return x


@torch.inference_mode()
def run_plain(block: nn.Module, inputs: list[Tensor], arguments: Arguments | None) -> None:
    """Replace each of ``inputs`` by the block's output for it: the forward pass without any pause."""
    for sample, hidden in enumerate(inputs):
        assert arguments is not None
        args, kwargs = arguments
        inputs[sample] = output_of(block(hidden, *args, **kwargs))


def output_of(result: Any) -> Tensor:
    """Return the hidden state of what a block returned: some families return a tuple."""
    hidden = result[0] if isinstance(result, tuple) else result
    assert isinstance(hidden, Tensor)
    return hidden
