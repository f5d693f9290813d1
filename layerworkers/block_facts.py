"""What a block does with a sample, found by running it on the meta device: no weight is needed.

Which linears share an input is told by the identity of the tensors that enter them; what is alive when, by counting.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from billhook.layerworkers.additions import Additions
from billhook.layerworkers.experts import Experts, Stop
from billhook.layerworkers.families import ROUTERS
from billhook.layerworkers.feed_forward import FeedForward, FeedForwards
from billhook.layerworkers.live import LiveTensors

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of a block, without the hidden state."""


@dataclass(frozen=True)
class InputGroup:
    """Linears of a block that share one input tensor; names are within the block."""

    stop: str
    """The module before which samples wait, whose input it is: the first of the linears, or what shows it earlier."""
    linears: tuple[str, ...]
    """In execution order; none where experts are chosen: the input is then which each token is sent to."""
    experts: str = ""
    """The experts that the linears belong to; empty: none."""
    share: float = 1.0
    """Of all tokens, those that come here where experts are sent as many each."""
    second: bool = False
    """Whether the linears end their experts."""
    number: int = 0
    """Of the expert."""
    residual: str = ""
    """The module that sees what the output of the only linear is added to, before that runs; empty: none is known."""


def deviations_of(group: InputGroup, shape: tuple[int, int]) -> int:
    """Return in how many values the input of a corrected group may deviate, given the shape of its first linear.

    As many as the linear has rows, where it is known what its output is added to; else as its input has channels.
    """
    return shape[0] if group.residual else shape[1]


@dataclass(frozen=True)
class BlockFacts:
    """How a block computes, found by running it on the meta device."""

    input_groups: tuple[InputGroup, ...]
    """In execution order."""
    returns_tuple: bool
    feed_forward: FeedForward | None = None
    """None where there is none of a known form, or several, or experts."""


@dataclass(frozen=True)
class Footprint:
    """Memory that one sample needs while it runs through a block, beside the block's weights; from a meta run."""

    hidden_bytes: int
    """Of its hidden state."""
    running_bytes: int
    """Most that is alive at once while it runs, its input included."""
    made_bytes: int
    """All tensors that it makes on the way, attention's scores left out: no more of them is kept for gradients."""
    waiting_bytes: dict[str, int]
    """What is alive while it waits for a group of linears, its input included; by the name of the stop."""
    scores_bytes: int
    """Of attention's scores in float32, of every token for every other: they are held for gradients only."""

    @property
    def backward_bytes(self) -> int:
        """Most that is alive at once while it runs through the block and gradients back, beside those of weights.

        What is made is there, and gradients of it; the scores, what becomes of them, and gradients of these.
        """
        return 2 * self.made_bytes + self.running_bytes + 3 * self.scores_bytes


def kind_of(block: nn.Module, arguments: Arguments) -> object:
    """Return what blocks have in common that compute alike."""
    leaves, structure = tree_flatten(arguments)
    shapes = [tuple(leaf.shape) if isinstance(leaf, Tensor) else type(leaf) for leaf in leaves]
    parameters = [(name, tuple(parameter.shape)) for name, parameter in block.named_parameters()]
    return type(block), str(structure), str(shapes), str(parameters)


def run_on_meta(block: nn.Module, hidden: Tensor, arguments: Arguments) -> BlockFacts:
    """Run a block whose parameters are on the meta device, noting which linears share an input tensor."""
    groups: dict[int, InputGroup] = {}
    alive: list[Tensor] = []  # an id is unique only while its tensor lives
    own = _groups_of_their_own(block)

    shares: dict[str, float] = {}

    def note(name: str, x: Tensor) -> None:
        alive.append(x)
        group = own[name]
        if group.experts and not group.linears:
            shares[group.experts] = _share(block.get_submodule(group.experts), x)
        group = replace(group, share=shares.get(group.experts, 1.0))
        if id(x) in groups:
            group = replace(groups[id(x)], linears=(*groups[id(x)].linears, *group.linears))
        groups[id(x)] = group

    plain = [] if any(group.experts for group in own.values()) else list(own)
    with Additions(block, own) as additions, FeedForwards(block, plain) as watching:
        out = _call_on_meta(block, hidden, arguments, list(own), note)
    residuals, networks = additions.residuals(), watching.found()
    return BlockFacts(
        tuple(
            replace(group, residual=residuals.get(group.linears[0], ""))
            if len(group.linears) == 1 and not group.experts
            else group
            for group in groups.values()
        ),
        isinstance(out, tuple),
        networks[0] if len(networks) == 1 else None,
    )


def _share(experts: nn.Module, routing: Tensor) -> float:
    """Return the share of the tokens that an expert is fitted to, given which each is sent to: [N, K], or a list."""
    assert isinstance(experts, Experts)
    if experts.shown_all:
        return 1.0
    choices: int = routing.shape[1] if routing.dim() == 2 else 1
    return choices / experts.count


def _groups_of_their_own(block: nn.Module) -> dict[str, InputGroup]:
    """Return, for each module that stands for linears, what the group would be if no other shared the input."""
    experts = {path: module for path, module in block.named_modules() if isinstance(module, Experts)}
    groups = {}
    for name, module in block.named_modules():
        owner = next((path for path in experts if name.startswith(f"{path}.")), "")
        if isinstance(module, Stop):
            linears = tuple(f"{owner}.{each}" for each in module.linears())
            groups[name] = InputGroup(name, linears, owner, second=module.second, number=module.number)
        elif owner and name == f"{owner}.routed":
            groups[name] = InputGroup(name, (), owner)
        elif isinstance(module, nn.Linear) and not owner and not _is_router(block, name):
            groups[name] = InputGroup(name, (name,))
    return groups


def _is_router(block: nn.Module, name: str) -> bool:
    """Whether a linear, or a module that it is part of, stands beside experts and is called a router."""
    parts = name.split(".")
    return any(
        part in ROUTERS and hasattr(block.get_submodule(".".join(parts[:depth])), "experts")
        for depth, part in enumerate(parts)
    )


def footprint_on_meta(
    block: nn.Module, hidden: Tensor, arguments: Arguments, groups: tuple[InputGroup, ...], heads: int
) -> Footprint:
    """Return what one sample needs in a block whose parameters are on the meta device; heads: of its attention."""
    live = LiveTensors()
    waiting: dict[str, int] = {}

    def note(name: str, x: Tensor) -> None:
        waiting[name] = live.size_bytes()

    with live.watching():
        _call_on_meta(block, hidden, arguments, [group.stop for group in groups], note)
    return Footprint(hidden.nbytes, live.peak_bytes, live.made_bytes, waiting, 4 * heads * hidden.shape[1] ** 2)


def _call_on_meta(
    block: nn.Module, hidden: Tensor, arguments: Arguments, stops: Sequence[str], note: Callable[[str, Tensor], None]
) -> Any:
    """Call a block whose parameters are on the meta device; ``note`` is told of the inputs of the modules ``stops``."""

    def to_meta(value: Any) -> Any:
        return value.to("meta") if isinstance(value, Tensor) else value

    buffers = [
        (module, name, buffer) for module in block.modules() for name, buffer in module.named_buffers(recurse=False)
    ]
    handles = [
        block.get_submodule(name).register_forward_pre_hook(lambda _, inputs, name=name: note(name, inputs[0]))
        for name in stops
    ]
    try:
        for module, name, buffer in buffers:
            setattr(module, name, buffer.to("meta"))
        args, kwargs = tree_map(to_meta, arguments)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return block(hidden.to("meta"), *args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
        for module, name, buffer in buffers:
            setattr(module, name, buffer)
