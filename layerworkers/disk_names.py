"""Which tensor on disk is which parameter: the module is made to have its linears as they are stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from billhook.layerworkers.errors import CheckpointError, UnsupportedModelError
from billhook.layerworkers.experts import Experts, Parts, part_of, stacked_names
from billhook.layerworkers.families import Stacked, stacked_experts
from billhook.layerworkers.shards import TensorEntry


class DiskNames:
    """The names on disk of a model's parameters, and how these are stored.

    transformers' stacked experts, and its linears whose weights are transposed, are replaced by linears in the model.
    """

    def __init__(self, model: Any, dtype: torch.dtype, separate_experts: bool | None):
        """separate_experts: whether each has tensors of its own; None: as transformers would save them.

        Raises:
            InputError: when transformers has no rule for how the experts are stored, or one that we cannot follow.
        """
        self._model, self._dtype = model, dtype
        self._stock_state = model.state_dict()
        self._rules, self._converters = _conversion_rules(model)
        self._transposed: set[str] = set()
        """Names of weights that are stored as their transposes."""
        self._unstack_experts(separate_experts)
        self._turn_convolutions()

    def module_names(self, disk_names: Sequence[str]) -> dict[str, str]:
        """Map names on disk to names in the module, by transformers' own renaming rules.

        Raises:
            InputError: when a tensor would have to be merged with others to fit the module, in a way that is not that
                of experts.
        """
        from transformers.core_model_loading import WeightRenaming, rename_source_key

        renamings = [rule for rule in self._rules if isinstance(rule, WeightRenaming)]
        names: dict[str, str] = {}
        for disk_name in disk_names:
            name, converted = rename_source_key(
                disk_name, renamings, self._converters, self._model.base_model_prefix, self._stock_state
            )
            if converted is not None:
                name = self._name_in_experts(disk_name, name)
            names[disk_name] = name
        return names

    def parameters_in(self, name: str, entry: TensorEntry) -> dict[str, TensorEntry]:
        """Return which parameters a tensor on disk, whose name in the module is ``name``, holds, and where in it."""
        path, _, leaf = name.rpartition(".")
        experts = self._module(path)
        if isinstance(experts, Experts) and leaf in (*experts.parts.first, experts.parts.second):
            names = [f"{path}.{number}.{leaf}.weight" for number in range(experts.count)]
            if entry.shape[:1] != (experts.count,) or len(entry.shape) != 3:
                raise CheckpointError(
                    f"{entry.path}: tensor {entry.name} has shape {list(entry.shape)}, config.json implies "
                    f"{experts.count} experts"
                )
            return {
                each: replace(entry.item(number), transposed=each in self._transposed)
                for number, each in enumerate(names)
            }
        return {name: replace(entry, transposed=name in self._transposed)}

    def disk_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each parameter as it is stored."""
        return {
            name: tuple(parameter.shape)[:: -1 if name in self._transposed else 1]
            for name, parameter in self._model.named_parameters()
        }

    def _module(self, path: str) -> nn.Module | None:
        try:
            module: nn.Module = self._model.get_submodule(path)
        except AttributeError:
            return None
        return module

    def _name_in_experts(self, disk_name: str, stacked_name: str) -> str:
        """Return the parameter for a tensor of one expert, which transformers would stack with others."""
        path = stacked_name.rpartition(".")[0]
        experts, part = self._module(path), part_of(disk_name)
        if isinstance(experts, Experts) and part is not None:
            number, leaf = part
            if number < experts.count and leaf in (*experts.parts.first, experts.parts.second):
                return f"{path}.{number}.{leaf}.weight"
        raise UnsupportedModelError(
            f"tensor {disk_name}: transformers makes {stacked_name} of it and others while loading "
            f"({type(self._model).__name__}), which billhook cannot do yet"
        )

    def _unstack_experts(self, separate: bool | None) -> None:
        """Replace transformers' stacked experts by linears, which are called as on disk."""
        stacks = [
            (path, module, layout)
            for path, module in self._model.named_modules()
            if (layout := stacked_experts(module)) is not None
        ]
        for path, module, layout in stacks:
            parts = self._parts_on_disk(path, layout)
            if parts is None and separate:
                raise UnsupportedModelError(
                    f"{type(self._model).__name__}: each expert has tensors of its own on disk, and transformers has "
                    f"no rule that stacks them to {path}"
                )
            if parts is None or separate is False:
                up, down = stacked_names(layout)
                parts = Parts((up,), down)
                if layout.is_transposed:
                    numbers = range(len(getattr(module, up)))
                    self._transposed |= {f"{path}.{number}.{part}.weight" for number in numbers for part in (up, down)}
            parent, _, leaf = path.rpartition(".")
            setattr(self._model.get_submodule(parent), leaf, Experts(module, layout, parts))

    def _parts_on_disk(self, path: str, layout: Stacked) -> Parts | None:
        """Return what transformers' rules call the linears of one expert; None where they are stacked on disk."""
        names = []
        for stacked in stacked_names(layout):
            rules = [
                rule
                for rule in self._converters
                if any(
                    f"{path}.{stacked}".endswith(target.replace("\\", "").lstrip("^."))
                    for target in rule.target_patterns
                )
            ]
            if not rules:
                return None
            operations = [type(each).__name__ for each in rules[0].operations]
            if operations not in (["MergeModulelist"], ["MergeModulelist", "Concatenate"]):
                raise UnsupportedModelError(
                    f"{type(self._model).__name__}: transformers makes {path}.{stacked} by {', '.join(operations)} "
                    "of tensors on disk, which billhook cannot do yet"
                )
            names.append(
                [
                    source.rpartition("*.")[2].removesuffix("$").removesuffix(".weight")
                    for source in rules[0].source_patterns
                ]
            )
        (first, (second,)) = names
        return Parts(tuple(first), second)

    def _turn_convolutions(self) -> None:
        """Replace transformers' ``Conv1D``, a linear whose weight is stored as its transpose."""
        from transformers.pytorch_utils import Conv1D

        for path, module in list(self._model.named_modules()):
            if isinstance(module, Conv1D):
                linear = nn.Linear(module.nx, module.nf, device="meta", dtype=self._dtype)
                parent, _, leaf = path.rpartition(".")
                setattr(self._model.get_submodule(parent), leaf, linear)
                self._transposed.add(f"{path}.weight")


def _conversion_rules(model: Any) -> tuple[list[Any], list[Any]]:
    """Return transformers' rules from names and tensors on disk to those of the module, and those that convert."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    rules = get_model_conversion_mapping(model)
    return rules, [rule for rule in rules if isinstance(rule, WeightConverter)]
