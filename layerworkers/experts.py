"""The experts of a layer as linears of their own, in place of the module in which transformers holds them stacked.

Legend: N tokens, H hidden size, I width of an expert, E experts, K experts that a token is sent to.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from billhook.layerworkers.families import Stacked


@dataclass(frozen=True)
class Parts:
    """What the linears of each expert are called on disk."""

    first: tuple[str, ...]
    """Linears of the expert's input, whose outputs stand one behind the other: gate and up, or both in one."""
    second: str
    """The linear that ends it."""


class Stop(nn.Module):
    """Shows the input of linears that run later: so those of many experts are known before any of them runs."""

    experts: Any

    def __init__(self, experts: Experts, second: bool, number: int):
        super().__init__()
        self.second, self.number = second, number
        object.__setattr__(self, "experts", experts)  # not as a submodule: it holds this one

    def linears(self) -> tuple[str, ...]:
        """Return the names, within the experts, of the linears that share the input."""
        parts: Parts = self.experts.parts
        return tuple(f"{self.number}.{part}" for part in ((parts.second,) if self.second else parts.first))

    def forward(self, x: Tensor) -> Tensor:
        """Return the input."""
        return x


class Experts(nn.Module):
    """Computes what transformers' stacked experts do, expert by expert, each of ``nn.Linear``s on the meta device."""

    _family: Any
    count: int
    at_once: int
    """Experts whose inputs are shown together, before the linears of any of them run."""
    widest: int
    """Channels of the widest input that an expert's linears have."""
    shown_all: frozenset[int]
    """Experts that show what they would make of all tokens, rather than of those that are sent to them."""

    def __init__(self, stacked: Any, layout: Stacked, parts: Parts):
        """stacked: transformers' module, which is ``layout``. parts: what its linears are called on disk."""
        super().__init__()
        object.__setattr__(self, "_family", stacked)  # for the activation, which is the family's own
        self._layout, self.parts = layout, parts
        up_name, down_name = stacked_names(layout)
        up, down = getattr(stacked, up_name), getattr(stacked, down_name)
        self.count = up.shape[0]
        inputs, outputs = (1, 2) if layout.is_transposed else (2, 1)
        hidden, inner = up.shape[inputs], up.shape[outputs]
        width = down.shape[inputs]
        assert inner % len(parts.first) == 0, f"{inner} outputs do not fall into {len(parts.first)} linears"
        for number in range(self.count):
            expert = nn.Module()
            for part in parts.first:
                expert.add_module(part, _linear(hidden, inner // len(parts.first), up.dtype))
            expert.add_module(parts.second, _linear(width, hidden, up.dtype))
            self.add_module(str(number), expert)
        self._biases = (f"{up_name}_bias", f"{down_name}_bias") if layout.has_bias else ()
        for name in self._biases:
            self.register_parameter(name, getattr(stacked, name))
        self.routed = nn.Identity()
        self.first = nn.ModuleList([Stop(self, False, number) for number in range(self.count)])
        self.second = nn.ModuleList([Stop(self, True, number) for number in range(self.count)])
        self.at_once, self.shown_all = self.count, frozenset()
        self.widest = max(hidden, width)

    @property
    def can_show_all(self) -> bool:
        """Whether an expert can be shown tokens that are not sent to it."""
        return not self._layout.by_expert

    def forward(self, hidden: Tensor, index_NK: Tensor | None = None, weights_NK: Tensor | None = None) -> Tensor:
        """Return what the family's own experts do.

        hidden: [N, H], with the experts that each token is sent to and their weights: then their weighted sum is
        returned, [N, H], summed in float32. Or [E * N, H], each expert's own input: then the outputs, in this order.
        """
        if index_NK is None or weights_NK is None:
            return self._of_own_inputs(hidden)
        index_NK = self.routed(index_NK)
        if index_NK.is_meta:
            index_NK = evenly(len(index_NK), index_NK.shape[1], self.count)
        tokens, slots = self._by_expert(index_NK)
        out_NH = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        for experts in self._chunks():
            given = {number: hidden[tokens[number]] for number in experts}
            for number, y in self._outputs(given, hidden):
                weighted = y * weights_NK[tokens[number], slots[number], None]
                # No token comes twice to one expert, so the order in which a device adds does not matter.
                out_NH.index_add_(0, tokens[number].to(out_NH.device), weighted.float())
        return out_NH.to(hidden.dtype)

    def _of_own_inputs(self, hidden: Tensor) -> Tensor:
        inputs_ENH = hidden.view(self.count, -1, hidden.shape[-1])
        out_ENH = torch.zeros_like(inputs_ENH)
        if hidden.is_meta:
            sent = [torch.arange(inputs_ENH.shape[1])] * self.count
        else:
            sent = [(x != 0).any(-1).nonzero()[:, 0] for x in inputs_ENH]
        self.routed(torch.cat([torch.full_like(each, number) for number, each in enumerate(sent)]))
        for experts in self._chunks():
            given = {number: inputs_ENH[number][sent[number]] for number in experts}
            for number, y in self._outputs(given, None):
                out_ENH[number].index_copy_(0, sent[number].to(y.device), y)
        return out_ENH.view_as(hidden)

    def _chunks(self) -> list[range]:
        return [range(start, min(start + self.at_once, self.count)) for start in range(0, self.count, self.at_once)]

    def _outputs(self, given: dict[int, Tensor], everything: Tensor | None) -> Iterator[tuple[int, Tensor]]:
        """Yield what experts make of their inputs, which are used up.

        everything: what some of them show instead; None: nothing is.
        """
        numbers = list(given)
        shown = {number: everything for number in numbers if number in self.shown_all and everything is not None}
        for number in numbers:
            self.first[number](shown.get(number, given[number]))
        inner = {number: self._inner(number, given.pop(number)) for number in numbers}
        for number in numbers:
            if number in shown and self.second[number]._forward_pre_hooks:  # else nobody looks
                self.second[number](self._inner(number, shown[number]))
            else:
                self.second[number](inner[number])
        for number in numbers:
            yield number, self._outer(number, inner.pop(number))

    def _inner(self, number: int, x: Tensor) -> Tensor:
        outputs = [self.get_submodule(f"{number}.{part}")(x) for part in self.parts.first]
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
        if self._biases:
            y = y + self.get_parameter(self._biases[0])[number]
        if not self._layout.has_gate:
            return self._act(y)
        if hasattr(self._family, "_apply_gate"):
            gated: Tensor = self._family._apply_gate(y)
            return gated
        gate, up = y.chunk(2, dim=-1)
        return up * self._act(gate)

    def _act(self, x: Tensor) -> Tensor:
        y: Tensor = self._family.act_fn(x)
        return y

    def _outer(self, number: int, inner: Tensor) -> Tensor:
        y: Tensor = self.get_submodule(f"{number}.{self.parts.second}")(inner)
        return y + self.get_parameter(self._biases[1])[number] if self._biases else y

    def _by_expert(self, index_NK: Tensor) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Return, for each expert, the tokens that are sent to it, in order, and which of their choices it is."""
        flat = index_NK.reshape(-1)
        order = flat.argsort(stable=True)
        # A number beyond the experts stands for "none" in some families.
        counts = torch.bincount(flat, minlength=self.count + 1).tolist()
        cut = torch.split(order, counts)
        return [each // index_NK.shape[1] for each in cut], [each % index_NK.shape[1] for each in cut]


def evenly(tokens: int, choices: int, experts: int) -> Tensor:
    """Return a routing [N, K] that gives each expert as many tokens as any other, or one more."""
    return (torch.arange(tokens * choices) % experts).view(tokens, choices)


def stacked_names(layout: Stacked) -> tuple[str, str]:
    """Return what transformers calls the two stacked parameters."""
    return ("gate_up_proj" if layout.has_gate else "up_proj"), "down_proj"


def part_of(disk_name: str) -> tuple[int, str] | None:
    """Return which expert's which linear a tensor on disk is; None where its name holds no number before the last."""
    found = re.search(r"\.(\d+)\.([^.]+)\.weight$", disk_name)
    return None if found is None else (int(found[1]), found[2])


def are_separate(disk_names: Iterable[str]) -> bool:
    """Whether experts have tensors of their own in a checkpoint with tensors of these names."""
    return any(re.search(r"\bexperts\.\d+\.", name) for name in disk_names)


def tokens_of(index_NK: Tensor, experts: int) -> list[int]:
    """Return how many tokens each expert is sent."""
    counts: list[int] = torch.bincount(index_NK.reshape(-1), minlength=experts)[:experts].tolist()
    return counts


class _Linear(nn.Linear):
    """A linear without weights of its own: there are tens of thousands of them."""

    def reset_parameters(self) -> None:
        """Draw nothing."""


def _linear(inputs: int, outputs: int, dtype: torch.dtype) -> nn.Linear:
    return _Linear(inputs, outputs, bias=False, device="meta", dtype=dtype)
