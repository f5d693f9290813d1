"""The model without its weights: where its blocks are, what they are called with, and what surrounds them.

The skeleton is built from the config on the meta device. Whatever is needed of the model itself - the arguments of
each block, the final norm, the head's scaling - comes from running the model's own forward with every block replaced
by a stub, so nothing here knows an architecture.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from billhook.layerworkers.errors import InputError
from billhook.layerworkers.live import LiveTensors

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of a block, without the hidden state."""


@dataclass(frozen=True)
class BlockFacts:
    """How a block computes, found by running it on the meta device."""

    input_groups: tuple[tuple[str, ...], ...]
    """Linears by the input tensor that they share, in execution order; names within the block."""
    returns_tuple: bool


@dataclass(frozen=True)
class Footprint:
    """Memory that one sample needs while it runs through a block, beside the block's weights; from a meta run."""

    hidden_bytes: int
    """Of its hidden state."""
    running_bytes: int
    """Most that is alive at once while it runs, its input included."""
    waiting_bytes: dict[str, int]
    """What is alive while it waits before a linear, its input included; by the linear's name."""


def load_config(folder: Path, trust_remote_code: bool) -> Any:
    """Read config.json through transformers.

    Raises:
        InputError: when there is none, or transformers does not know the architecture.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{folder}: no config.json; expected a Hugging Face model folder")
    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code, local_files_only=True)
    except (ValueError, KeyError, OSError, TypeError, AttributeError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"{path}: transformers cannot read it: {first_line} "
            "(an architecture with its own code needs --trust-remote-code)"
        ) from error
    remote = trust_remote_code and "AutoModelForCausalLM" in getattr(config, "auto_map", {})
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not remote:
        raise InputError(
            f"{path}: model_type {getattr(config, 'model_type', None)!r} is no causal language model of transformers "
            "(an architecture with its own code needs --trust-remote-code)"
        )
    return config


class Skeleton:
    """A causal language model whose parameters are on the meta device; buffers are real, on ``device``."""

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device, trust_remote_code: bool = False):
        from accelerate import init_empty_weights
        from transformers import AutoModelForCausalLM

        self.config = load_config(folder, trust_remote_code)
        self.dtype, self.device = dtype, device
        with init_empty_weights(include_buffers=False):
            self.model: Any = AutoModelForCausalLM.from_config(
                self.config, dtype=dtype, trust_remote_code=trust_remote_code
            )
        self.model.eval()
        self.model.tie_weights()
        self.blocks_path, block_list = _find_blocks(self.model)
        self.blocks: list[nn.Module] = list(block_list)
        self._block_list = block_list
        self._owner: Any = self.model.get_submodule(self.blocks_path.rpartition(".")[0])
        self._facts: dict[int, BlockFacts] = {}
        for module in self.model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))
        self._find_facts()

    def module_names(self, disk_names: Sequence[str]) -> dict[str, str]:
        """Map names on disk to names in the module, by transformers' own renaming rules.

        Raises:
            InputError: when a tensor would have to be merged with others to fit the module (fused experts).
        """
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        mapping = get_model_conversion_mapping(self.model)
        renamings = [rule for rule in mapping if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in mapping if isinstance(rule, WeightConverter)]
        state = self.model.state_dict()
        names: dict[str, str] = {}
        for disk_name in disk_names:
            name, converted = rename_source_key(disk_name, renamings, converters, self.model.base_model_prefix, state)
            if converted is not None:
                raise InputError(
                    f"tensor {disk_name}: transformers merges it with others while loading "
                    f"({type(self.model).__name__}); mixtures of experts and other merged layouts are not supported yet"
                )
            names[disk_name] = name
        return names

    def facts(self, index: int) -> BlockFacts:
        """Return how block ``index`` computes."""
        return self._facts[index]

    def stem_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters before and after the blocks by module name, without embedding and head matrices."""
        skipped = {id(module.weight) for module in (self._embedding(), self._head()) if module is not None}
        return {
            name: parameter
            for name, parameter in self.model.named_parameters()
            if not name.startswith(self.blocks_path + ".") and id(parameter) not in skipped
        }

    def embedding_name(self) -> str:
        """Return the module name of the embedding matrix."""
        return _name_of(self.model, self._embedding()) + ".weight"

    def head_name(self) -> str:
        """Return the module name of the head matrix: that of the embedding matrix where the two are tied."""
        head = self._head()
        if head is None or head.weight is self._embedding().weight:
            return self.embedding_name()
        return _name_of(self.model, head) + ".weight"

    def tied_head_name(self) -> str:
        """Return the name under which the head matrix would be a parameter of its own, were it not tied."""
        return _name_of(self.model, self._head_module()) + ".weight"

    def set_parameter(self, name: str, value: Tensor) -> None:
        """Put a tensor in place of the parameter ``name``, in the compute dtype, on the device."""
        path, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(path)
        data = value.to(self.device, self.dtype if value.is_floating_point() else None)
        setattr(module, leaf, data if leaf in module._buffers else nn.Parameter(data, requires_grad=False))

    def drop_block(self, index: int) -> None:
        """Free the parameters of block ``index``: they go back to the meta device, buffers stay."""
        for module in self.blocks[index].modules():
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(parameter.to("meta"), requires_grad=False))

    @torch.inference_mode()
    def begin(self, tokens: Tensor, rows_of: Callable[[Tensor], Tensor]) -> tuple[Tensor, list[Arguments]]:
        """Run the model up to its blocks: return block 0's hidden state and each block's arguments.

        tokens: [T] int64. rows_of: maps token ids [U] to their rows of the embedding matrix [U, H], so that the
        matrix is never held. The stem parameters must have been set.
        """
        distinct, positions = torch.unique(tokens, return_inverse=True)
        embedding = self._embedding()
        whole, embedding.weight = embedding.weight, nn.Parameter(rows_of(distinct), requires_grad=False)
        padding, embedding.padding_idx = (
            embedding.padding_idx,
            None,
        )  # a row of the whole matrix; matters to gradients only
        try:
            embedded = embedding(positions[None].to(self.device))
        finally:
            embedding.weight, embedding.padding_idx = whole, padding
        return self._record(embedded)

    @torch.inference_mode()
    def finish(self, hidden: Tensor, head: Callable[[Tensor], Tensor]) -> Tensor:
        """Run what follows the blocks: return the logits [1, T, V] for the last block's output [1, T, H].

        head: the linear map of the head matrix, so that it can be applied in slices; the model's own forward does
        the rest (final norm, bias, scaling, capping).
        """
        last = len(self.blocks) - 1
        name = _name_of(self.model, self._head_module())
        path, _, leaf = name.rpartition(".")
        parent = self.model.get_submodule(path) if path else self.model
        original = getattr(parent, leaf)
        setattr(parent, leaf, _HeadStub(original, head))
        try:
            with self._stubs(lambda index, given, arguments: hidden if index == last else given):
                embedded = torch.zeros(
                    *hidden.shape[:-1], self._embedding().embedding_dim, dtype=self.dtype, device=self.device
                )
                logits: Tensor = self.model(inputs_embeds=embedded, use_cache=False).logits
        finally:
            setattr(parent, leaf, original)
        return logits

    def footprints(self, tokens: int) -> list[Footprint]:
        """Return for each block what one sample of ``tokens`` tokens needs in it; no weight is needed."""
        found: dict[object, Footprint] = {}
        by_block: list[Footprint] = []

        def visit(index: int, given: Tensor, arguments: Arguments) -> Tensor:
            block = self.blocks[index]
            leaves = [tuple(leaf.shape) for leaf in tree_flatten(arguments)[0] if isinstance(leaf, Tensor)]
            kind = (type(block), str(leaves), str([(name, p.shape) for name, p in block.named_parameters()]))
            if kind not in found:
                found[kind] = _footprint_on_meta(block, given, arguments, self._facts[index].input_groups)
            by_block.append(found[kind])
            return given

        self._visit_blocks(tokens, visit)
        return by_block

    def _find_facts(self) -> None:
        """Run every block on the meta device, called as the model calls it for a few tokens."""

        def visit(index: int, given: Tensor, arguments: Arguments) -> Tensor:
            self._facts[index] = _run_on_meta(self.blocks[index], given, arguments)
            return given

        self._visit_blocks(8, visit)

    @torch.inference_mode()
    def _visit_blocks(self, tokens: int, visit: Callable[[int, Tensor, Arguments], Tensor]) -> None:
        """Run the model's own forward on ``tokens`` zero embeddings, with ``visit`` in place of every block."""
        stem = self.stem_parameters()
        held = {name: parameter for name, parameter in stem.items() if parameter.device.type == "meta"}
        for name, parameter in held.items():
            self.set_parameter(name, torch.zeros(parameter.shape, dtype=parameter.dtype))
        try:
            embedded = torch.zeros(1, tokens, self._embedding().embedding_dim, dtype=self.dtype, device=self.device)
            with self._stubs(visit):
                self._owner(inputs_embeds=embedded, use_cache=False)
        finally:
            for name, parameter in held.items():
                path, _, leaf = name.rpartition(".")
                setattr(self.model.get_submodule(path), leaf, parameter)

    def _record(self, embedded: Tensor) -> tuple[Tensor, list[Arguments]]:
        hidden: list[Tensor] = []
        recorded: list[Arguments] = []

        def visit(index: int, given: Tensor, arguments: Arguments) -> Tensor:
            if index == 0:
                hidden.append(given)
            recorded.append(arguments)
            return given

        with self._stubs(visit):
            self._owner(inputs_embeds=embedded, use_cache=False)
        return hidden[0], recorded

    @contextmanager
    def _stubs(self, visit: Callable[[int, Tensor, Arguments], Tensor]) -> Iterator[None]:
        """Replace every block by a stub that returns ``visit(index, hidden, arguments)``."""
        for index, block in enumerate(self.blocks):
            self._block_list[index] = _BlockStub(index, block, visit, self._facts)
        try:
            yield
        finally:
            for index, block in enumerate(self.blocks):
                self._block_list[index] = block

    def _embedding(self) -> Any:
        return self.model.get_input_embeddings()

    def _head(self) -> Any:
        return self.model.get_output_embeddings()

    def _head_module(self) -> Any:
        head = self._head()
        if head is None:
            raise InputError(f"{type(self.model).__name__} has no output embeddings: not a causal language model")
        return head


class _BlockStub(nn.Module):
    """Stands in for a block; attributes that the model reads of a block come from the real one."""

    def __init__(
        self,
        index: int,
        block: nn.Module,
        visit: Callable[[int, Tensor, Arguments], Tensor],
        facts: Mapping[int, BlockFacts],
    ):
        super().__init__()
        self._index, self._visit, self._facts = index, visit, facts
        object.__setattr__(self, "_block", block)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "_block"), name)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return what the block would, with the visitor's hidden state."""
        out = self._visit(self._index, hidden, (args, kwargs))
        return (out,) if self._facts[self._index].returns_tuple else out


class _HeadStub(nn.Module):
    """Stands in for the head linear; its bias is the real one's."""

    def __init__(self, head: Any, apply: Callable[[Tensor], Tensor]):
        super().__init__()
        self._apply_head = apply
        self.bias = getattr(head, "bias", None)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the logits of ``hidden`` [..., H]."""
        logits = self._apply_head(hidden)
        return logits if self.bias is None else logits + self.bias


def _find_blocks(model: Any) -> tuple[str, nn.ModuleList]:
    count = model.config.get_text_config().num_hidden_layers
    names = set(model._no_split_modules or ())
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count and type(module[0]).__name__ in names:
            return name, module
    raise InputError(
        f"{type(model).__name__}: found no list of {count} blocks whose class is one of {sorted(names)}; "
        "this architecture is not supported yet"
    )


def _name_of(model: nn.Module, wanted: nn.Module) -> str:
    names: list[str] = [name for name, module in model.named_modules() if module is wanted]
    return names[0]


def _run_on_meta(block: nn.Module, hidden: Tensor, arguments: Arguments) -> BlockFacts:
    """Run a block whose parameters are on the meta device, noting which linears share an input tensor."""
    groups: dict[int, list[str]] = {}
    alive: list[Tensor] = []  # an id is unique only while its tensor lives

    def note(name: str, x: Tensor) -> None:
        alive.append(x)
        groups.setdefault(id(x), []).append(name)

    linears = [name for name, module in block.named_modules() if isinstance(module, nn.Linear)]
    out = _call_on_meta(block, hidden, arguments, linears, note)
    return BlockFacts(tuple(tuple(names) for names in groups.values()), isinstance(out, tuple))


def _footprint_on_meta(
    block: nn.Module, hidden: Tensor, arguments: Arguments, groups: tuple[tuple[str, ...], ...]
) -> Footprint:
    live = LiveTensors()
    waiting: dict[str, int] = {}

    def note(name: str, x: Tensor) -> None:
        waiting[name] = live.size_bytes()

    with live.watching():
        _call_on_meta(block, hidden, arguments, [name for group in groups for name in group], note)
    return Footprint(hidden.nbytes, live.peak_bytes, waiting)


def _call_on_meta(
    block: nn.Module, hidden: Tensor, arguments: Arguments, linears: Sequence[str], note: Callable[[str, Tensor], None]
) -> Any:
    """Call a block whose parameters are on the meta device; ``note`` is told of the inputs of ``linears``."""

    def to_meta(value: Any) -> Any:
        return value.to("meta") if isinstance(value, Tensor) else value

    buffers = [
        (module, name, buffer) for module in block.modules() for name, buffer in module.named_buffers(recurse=False)
    ]
    handles = [
        block.get_submodule(name).register_forward_pre_hook(lambda _, inputs, name=name: note(name, inputs[0]))
        for name in linears
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


def same_arguments(left: Sequence[Arguments], right: Sequence[Arguments]) -> bool:
    """Whether two samples' block arguments are equal: then one copy serves all samples of this length."""
    left_leaves, left_tree = tree_flatten(list(left))
    right_leaves, right_tree = tree_flatten(list(right))
    return left_tree == right_tree and all(
        a is b or (torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else bool(a == b))
        for a, b in zip(left_leaves, right_leaves, strict=True)
    )
