"""The model without its weights: where its blocks are, what they are called with, and what surrounds them.

The skeleton is built from the config on the meta device. Whatever is needed of the model itself - the arguments of
each block, the final norm, the head's scaling - comes from running the model's own forward with every block replaced
by a stub, so nothing here knows an architecture.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from billhook.layerworkers.block_facts import (
    Arguments,
    BlockFacts,
    Footprint,
    footprint_on_meta,
    kind_of,
    run_on_meta,
)
from billhook.layerworkers.disk_names import DiskNames
from billhook.layerworkers.errors import CheckpointError, OptionError, UnsupportedModelError
from billhook.layerworkers.experts import Experts


def load_config(folder: Path, trust_remote_code: bool) -> Any:
    """Read config.json through transformers.

    Raises:
        InputError: when there is none, or transformers does not know the architecture.
    """
    _import_generation()
    from transformers import AutoConfig

    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder}: no config.json; expected a Hugging Face model folder")
    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # transformers raises many kinds here, by what is wrong
        raise UnsupportedModelError(
            f"{path}: transformers cannot read it: {_in_one_line(error)} "
            "(an architecture with its own code needs --trust-remote-code)"
        ) from error
    remote = trust_remote_code and "AutoModelForCausalLM" in getattr(config, "auto_map", {})
    if _auto_class(config) is None and not remote:
        raise UnsupportedModelError(
            f"{path}: model_type {getattr(config, 'model_type', None)!r} is neither a causal language model of "
            "transformers nor one of image and text (an architecture with its own code needs --trust-remote-code)"
        )
    return config


def _import_generation() -> None:
    """Import what every model class of transformers imports, without scikit-learn where that is installed.

    It, and pandas with it, is for assisted generation alone; it would take each process a second or two and 100 MB.
    """
    from transformers import utils

    whether, utils.is_sklearn_available = utils.is_sklearn_available, lambda: False
    try:
        import transformers.generation.utils  # noqa: F401
    finally:
        utils.is_sklearn_available = whether


def _empty_model(config: Any, path: Path, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    """Make a model whose parameters are on the meta device."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    try:
        with init_empty_weights(include_buffers=False):
            model: Any = (_auto_class(config) or AutoModelForCausalLM).from_config(
                config, dtype=dtype, trust_remote_code=trust_remote_code
            )
    except Exception as error:  # whatever a class makes of values that cannot be
        raise UnsupportedModelError(
            f"{path}: transformers cannot make a model of it: {_in_one_line(error)}; is a value of it wrong?"
        ) from error
    if (count := config.get_text_config().num_hidden_layers) < 1:
        raise UnsupportedModelError(f"{path}: num_hidden_layers is {count}; expected at least 1")
    return model


def _in_one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {textwrap.shorten(str(error), 300)}"


def _auto_class(config: Any) -> Any:
    """Return transformers' class that makes a model for a config, with its images where it takes any; None: neither."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    )

    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else None


class Skeleton:
    """A causal language model whose parameters are on the meta device; buffers are real, on ``device``."""

    def __init__(
        self,
        folder: Path,
        dtype: torch.dtype,
        device: torch.device,
        trust_remote_code: bool = False,
        separate_experts: bool | None = None,
        route_all: bool = False,
    ):
        """separate_experts: whether each has tensors of its own on disk; None: as transformers would save them.

        route_all: experts show what they would make of all tokens.
        """
        self.config = load_config(folder, trust_remote_code)
        self.dtype, self.device = dtype, device
        self.model = _empty_model(self.config, folder / "config.json", dtype, trust_remote_code)
        self.model.eval()
        self.model.tie_weights()
        self.names = DiskNames(self.model, dtype, separate_experts)
        self.blocks_path, block_list = _find_blocks(self.model)
        self.blocks: list[nn.Module] = list(block_list)
        self._block_list = block_list
        self._owner: Any = self.model.get_submodule(self.blocks_path.rpartition(".")[0])
        self._facts: dict[int, BlockFacts] = {}
        for module in self.model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))
        if route_all:
            for path, experts in self._experts().items():
                if not experts.can_show_all:
                    raise OptionError(
                        f"--route all: {type(self.model).__name__} scales what an expert is sent by how much it is "
                        f"wanted ({path}), so that there is nothing to show to the others; leave --route out"
                    )
                experts.shown_all = frozenset(range(experts.count))
        self._find_facts()

    @property
    def can_pool(self) -> bool:
        """Whether every expert can be shown tokens that are not sent to it."""
        return all(experts.can_show_all for experts in self._experts().values())

    def facts(self, index: int) -> BlockFacts:
        """Return how block ``index`` computes."""
        return self._facts[index]

    def stem_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters before and after the blocks by module name, without embedding and head matrices.

        Those of parts that text does not pass, such as an image encoder, are not among them.
        """
        skipped = {id(module.weight) for module in (self._embedding(), self._head()) if module is not None}
        passed = tuple(f"{_name_of(self.model, module)}." for module in (self._owner, self._head_module()))
        return {
            name: parameter
            for name, parameter in self.model.named_parameters()
            if not name.startswith(self.blocks_path + ".") and id(parameter) not in skipped and name.startswith(passed)
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
        return self._finished(hidden, head)

    def output_gradient(
        self, hidden: Tensor, head: Callable[[Tensor], Tensor], gradient_of: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Return a loss's gradient by the last block's output [1, T, H], in the compute dtype.

        head: as of :meth:`finish`. gradient_of: returns the loss's gradient by the logits, given these, [1, T, V].
        """
        with torch.inference_mode(False), torch.enable_grad():
            given = hidden.clone().requires_grad_()
            logits = self._finished(given, head)
            return torch.autograd.grad(logits, given, gradient_of(logits.detach()))[0]

    def _finished(self, hidden: Tensor, head: Callable[[Tensor], Tensor]) -> Tensor:
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
        heads = getattr(self.config.get_text_config(), "num_attention_heads", 0)  # some have none
        by_block: list[Footprint] = []

        def visit(index: int, given: Tensor, arguments: Arguments) -> Tensor:
            block = self.blocks[index]
            kind = kind_of(block, arguments)
            if kind not in found:
                groups = self._facts[index].input_groups
                found[kind] = footprint_on_meta(block, given, arguments, groups, heads)
            by_block.append(found[kind])
            return given

        self._visit_blocks(tokens, visit)
        return by_block

    def _experts(self) -> dict[str, Experts]:
        return {path: module for path, module in self.model.named_modules() if isinstance(module, Experts)}

    def _find_facts(self) -> None:
        """Run every kind of block on the meta device, called as the model calls it for a few tokens."""
        found: dict[object, BlockFacts] = {}

        def visit(index: int, given: Tensor, arguments: Arguments) -> Tensor:
            kind = kind_of(self.blocks[index], arguments)
            if kind not in found:
                try:
                    found[kind] = run_on_meta(self.blocks[index], given, arguments)
                except (NotImplementedError, RuntimeError) as error:  # such as where a branch depends on values
                    raise UnsupportedModelError(
                        f"{type(self.model).__name__}: block {index} cannot be run without its weights "
                        f"({str(error).strip().splitlines()[0]}); this architecture is not supported yet"
                    ) from error
            self._facts[index] = found[kind]
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
            raise UnsupportedModelError(
                f"{type(self.model).__name__} has no output embeddings: not a causal language model"
            )
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
    decoder = set(model.get_decoder().modules())  # an image encoder may have as many blocks
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) != count or module not in decoder:
            continue
        if not names or type(module[0]).__name__ in names:  # some classes name none
            return name, module
    kinds = f" of {sorted(names)}" if names else ""
    raise UnsupportedModelError(
        f"{type(model).__name__}: found no list of {count} blocks{kinds} in its decoder; this architecture is not "
        "supported yet"
    )


def _name_of(model: nn.Module, wanted: nn.Module) -> str:
    names: list[str] = [name for name, module in model.named_modules() if module is wanted]
    return names[0]


def same_arguments(left: Sequence[Arguments], right: Sequence[Arguments]) -> bool:
    """Whether two samples' block arguments are equal: then one copy serves all samples of this length."""
    left_leaves, left_tree = tree_flatten(list(left))
    right_leaves, right_tree = tree_flatten(list(right))
    return left_tree == right_tree and all(
        a is b or (torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else bool(a == b))
        for a, b in zip(left_leaves, right_leaves, strict=True)
    )
