"""Which linears of a block are its feed-forward network, and what happens between them: found by watching it run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map


@dataclass(frozen=True)
class Made:
    """What one of the steps before made, or, below 0, what one of the linears did."""

    number: int


@dataclass(frozen=True)
class Pointwise:
    """What a block does to each entry of what one or two linears make."""

    steps: tuple[tuple[Any, tuple[Any, ...], dict[str, Any]], ...]
    """Functions of torch with their arguments, in order; the last one's result is meant."""
    flipped: bool = False
    """Whether the first of two is what the other's activation is multiplied by."""

    def __call__(self, *made: Tensor) -> Tensor:
        """Return what it makes of the linears' outputs, all of one shape; gradients go through it."""
        values: list[Tensor] = []
        of_linears = made[::-1] if self.flipped else made

        def known(value: Any) -> Any:
            if not isinstance(value, Made):
                return value
            return values[value.number] if value.number >= 0 else of_linears[-1 - value.number]

        for function, args, kwargs in self.steps:
            values.append(function(*tree_map(known, args), **tree_map(known, kwargs)))
        return values[-1]

    @property
    def is_relu(self) -> bool:
        """Whether it is no more than the rectifier."""
        return [function for function, _, _ in self.steps] == [torch.ops.aten.relu.default]


@dataclass(frozen=True)
class FeedForward:
    """Linears by their names in the block: ``down(between(up x))``, or ``down(between(gate x, up x))``."""

    gate: str
    """Empty: it has none."""
    up: str
    """Where there is a gate, what comes of that is multiplied by this one's output."""
    down: str
    between: Pointwise

    @property
    def linears(self) -> tuple[str, ...]:
        """All of them, the last one last."""
        return (self.gate, self.up, self.down) if self.gate else (self.up, self.down)

    def activation(self, x: Tensor) -> Tensor:
        """Return what becomes of the first linear's output, entry by entry, before it is multiplied by another's."""
        return self.between(x, torch.ones_like(x)) if self.gate else self.between(x)


class FeedForwards(TorchDispatchMode):
    """Notes, while it is entered, what the inputs of a block's linears are made of."""

    def __init__(self, block: nn.Module, linears: Iterable[str]):
        super().__init__()
        self._block, self._linears = block, tuple(linears)
        self._alive: list[Any] = []  # an id is unique only while its tensor lives
        self._steps: dict[int, tuple[Any, Sequence[Any], Mapping[str, Any]]] = {}
        self._changed: set[int] = set()
        self._made_by: dict[int, str] = {}
        self._given: dict[str, Tensor] = {}
        self._calls: Counter[str] = Counter()
        self._hooks = ExitStack()

    def __enter__(self) -> Any:
        for name in self._linears:
            handle = self._block.get_submodule(name).register_forward_hook(
                lambda _module, given, out, name=name: self._note(name, given[0], out)
            )
            self._hooks.callback(handle.remove)
        return super().__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, traceback)
        self._hooks.close()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[Any], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._schema.is_mutable and args and isinstance(args[0], Tensor):
            self._changed.add(args[0].untyped_storage()._cdata)
        if isinstance(out, Tensor):
            self._alive.append((out, args))
            self._steps[id(out)] = (func, args, kwargs or {})
        return out

    def found(self) -> list[FeedForward]:
        """Return the feed-forward networks: what is of another form is none."""
        candidates = (self._ending_with(name) for name in self._linears if self._calls[name] == 1)
        return [each for each in candidates if each is not None]

    def _note(self, name: str, x: Tensor, out: Any) -> None:
        self._calls[name] += 1
        if isinstance(out, Tensor):
            self._alive.append((x, out))
            self._given[name], self._made_by[id(out)] = x, name

    def _ending_with(self, down: str) -> FeedForward | None:
        """Return the network that a linear ends, if it does."""
        steps: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
        numbers: dict[int, int] = {}
        before: list[str] = []

        def trace(tensor: Tensor) -> bool:
            """Add what a tensor is made by to the steps; say whether it is made entry by entry, of linears' outputs."""
            if id(tensor) in numbers:
                return True
            if tensor.untyped_storage()._cdata in self._changed:
                return False
            if (name := self._made_by.get(id(tensor))) is not None:
                before.append(name)
                numbers[id(tensor)] = -len(before)
                return len(before) <= 2
            function, args, kwargs = self._steps.get(id(tensor), (None, (), {}))
            if function is None or torch.Tag.pointwise not in function.tags:
                return False
            given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            if not given or any(each.shape != tensor.shape for each in given) or not all(map(trace, given)):
                return False

            def numbered(value: Any) -> Any:
                return Made(numbers[id(value)]) if isinstance(value, Tensor) else value

            numbers[id(tensor)] = len(steps)
            steps.append((function, tree_map(numbered, tuple(args)), tree_map(numbered, dict(kwargs))))
            return True

        if not trace(self._given[down]) or not steps or any(self._calls[name] != 1 for name in before):
            return None
        return _oriented(before, down, Pointwise(tuple(steps)), [self._given[name] for name in before])


def _oriented(before: Sequence[str], down: str, between: Pointwise, inputs: Sequence[Tensor]) -> FeedForward | None:
    """Return the network with its gate in its place; None where two linears do not gate each other."""
    if len(before) == 1:
        return FeedForward("", before[0], down, between)
    if inputs[0] is not inputs[1]:
        return None
    one, other = before
    for gate, up, asked in ((one, other, between), (other, one, replace(between, flipped=True))):
        if _is_linear_in_second(asked):
            return FeedForward(gate, up, down, asked)
    return None


def _is_linear_in_second(between: Pointwise) -> bool:
    """Whether the second of two inputs is only multiplied by what comes of the first."""
    first = torch.linspace(-6.0, 6.0, 49, dtype=torch.float64)
    factor = between(first, torch.ones_like(first))
    seconds = (torch.full_like(first, value) for value in (0.0, -0.5, 3.0, 100.0))
    return all(torch.allclose(between(first, second), factor * second) for second in seconds)
