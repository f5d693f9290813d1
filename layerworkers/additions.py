"""To what the outputs of a block's linears are added, found by watching the block run: its residual stream."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


class Additions(TorchDispatchMode):
    """Notes, while it is entered, which sums a block makes of a linear's very output and another tensor.

    What is scaled or normalised first is no such sum. A tensor is known by the first module that is given it, of those
    that are given nothing else: what another sample would be found by must not be ambiguous.
    """

    def __init__(self, block: nn.Module, linears: Iterable[str]):
        super().__init__()
        self._block, self._linears = block, tuple(linears)
        self._alive: list[Tensor] = []  # an id is unique only while its tensor lives
        self._seen_by: defaultdict[int, list[tuple[int, str]]] = defaultdict(list)
        self._made_by: dict[int, str] = {}
        self._called: dict[str, int] = {}
        self._calls: Counter[str] = Counter()
        self._added: dict[str, Tensor] = {}
        self._hooks = ExitStack()

    def __enter__(self) -> Any:
        for name, module in self._block.named_modules():
            if name:
                self._hooks.callback(
                    module.register_forward_pre_hook(
                        lambda _, args, kwargs, name=name: self._see(name, [*args, *kwargs.values()]), with_kwargs=True
                    ).remove
                )
        for name in self._linears:
            module = self._block.get_submodule(name)
            handle = module.register_forward_hook(lambda _module, _args, out, name=name: self._make(name, out))
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
        if func in (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor) and not kwargs:
            one, other = args
            for summand, beside in ((one, other), (other, one)):
                name = self._made_by.get(id(summand))
                if name is not None and isinstance(beside, Tensor) and id(beside) not in self._made_by:
                    self._added.setdefault(name, beside)
            if func is torch.ops.aten.add_.Tensor:  # from here on it is a sum itself
                self._made_by.pop(id(one), None)
        return func(*args, **(kwargs or {}))

    def residuals(self) -> dict[str, str]:
        """Return, by the linears whose output is added to something, the module that was given that before."""
        known = {
            name: [
                module
                for order, module in self._seen_by.get(id(added), [])
                if order < self._called[name] and self._calls[module] == 1
            ]
            for name, added in self._added.items()
        }
        return {name: modules[0] for name, modules in known.items() if modules}

    def _see(self, name: str, given: Sequence[Any]) -> None:
        order = len(self._called)
        self._called.setdefault(name, order)
        self._calls[name] += 1
        for value in given[:1]:
            if isinstance(value, Tensor):
                self._alive.append(value)
                self._seen_by[id(value)].append((order, name))

    def _make(self, name: str, out: Any) -> None:
        if isinstance(out, Tensor):
            self._alive.append(out)
            self._made_by[id(out)] = name
