"""How a checkpoint's tensors belong to the model: stem, blocks, linears."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

from billhook.layerworkers.block_facts import InputGroup
from billhook.layerworkers.errors import CheckpointError
from billhook.layerworkers.shards import DTYPES, FLOAT_DTYPES, TensorEntry
from billhook.layerworkers.skeleton import Skeleton
from billhook.layerworkers.tasks import ModuleTensor, StemTask
from billhook.orchestrator.checkpoint import Checkpoint


@dataclass(frozen=True)
class Linear:
    """A linear inside a block."""

    disk_name: str
    name: str
    """Name of the module within the block."""
    shape: tuple[int, int]
    """Outputs, inputs."""
    group: int
    """Number of the input tensor, within the block, that it shares with others."""
    item_bytes: int
    """Of one weight on disk."""

    @property
    def kind(self) -> str:
        """Name within the block that all experts' linears of this kind share."""
        return re.sub(r"\.\d+\.", ".*.", self.name)


@dataclass(frozen=True)
class Block:
    """What one block has on disk."""

    index: int
    tensors: tuple[ModuleTensor, ...]
    others: tuple[TensorEntry, ...]
    """Tensors of the block that are no parameter of the module."""
    linears: tuple[Linear, ...]
    """In execution order."""
    groups: tuple[InputGroup, ...]
    """Inputs of linears, by the number that these give."""
    other_matrices: tuple[str, ...]
    """Names on disk of the matrices that are the weight of no linear that runs: left dense."""
    feed_forward: tuple[str, ...] = ()
    """Names within the block of the linears of its feed-forward network, the last one last; none: it has none of a
    known form."""

    @cached_property
    def experts(self) -> int:
        """How many experts its layers have; 0: it has none."""
        return max((group.number + 1 for group in self.groups if group.experts), default=0)


@dataclass(frozen=True)
class Layout:
    """All tensors of a checkpoint by their place in the model."""

    stem: StemTask
    blocks: tuple[Block, ...]
    rest: tuple[TensorEntry, ...]
    """Every tensor outside the blocks."""


def lay_out(checkpoint: Checkpoint, skeleton: Skeleton) -> Layout:
    """Match tensors on disk with the model's parameters.

    Raises:
        InputError: when a parameter has no tensor, or one of another shape.
    """
    names = skeleton.names.module_names(list(checkpoint.tensors))
    parameters = dict(skeleton.model.named_parameters()) | dict(skeleton.model.named_buffers())
    by_module: dict[str, TensorEntry] = {}
    matched: set[str] = set()
    for disk_name, module_name in names.items():
        for parameter, entry in skeleton.names.parameters_in(module_name, checkpoint.tensors[disk_name]).items():
            if parameter in parameters:
                expected = tuple(parameters[parameter].shape)
                if entry.meant_shape != expected:
                    raise CheckpointError(
                        f"{entry.path}: tensor {entry.name} has shape {list(entry.shape)}, config.json implies "
                        f"{list(expected)}" + (", transposed" if entry.transposed else "")
                    )
                by_module[parameter] = entry
                matched.add(disk_name)
    blocks = tuple(
        _block(checkpoint, skeleton, index, names, matched, by_module) for index in range(len(skeleton.blocks))
    )
    prefix = f"{skeleton.blocks_path}."
    in_blocks = {disk_name for disk_name, module_name in names.items() if module_name.startswith(prefix)}
    return Layout(
        _stem(checkpoint, skeleton, by_module, names),
        blocks,
        tuple(entry for entry in checkpoint.tensors.values() if entry.name not in in_blocks),
    )


def _stem(
    checkpoint: Checkpoint, skeleton: Skeleton, by_module: dict[str, TensorEntry], names: dict[str, str]
) -> StemTask:
    needed = list(skeleton.stem_parameters())
    missing = [name for name in needed if name not in by_module]
    if missing:
        raise CheckpointError(f"{checkpoint.folder}: no tensor for the parameter {missing[0]}; is a shard missing?")
    embedding, head = by_module.get(skeleton.embedding_name()), by_module.get(skeleton.head_name())
    if embedding is None and skeleton.head_name() == skeleton.embedding_name():
        # Tied, and stored under the head's name only, which is no parameter of the module.
        tied = [checkpoint.tensors[disk] for disk, name in names.items() if name == skeleton.tied_head_name()]
        embedding = head = tied[0] if tied else None
    for entry, name in ((embedding, skeleton.embedding_name()), (head, skeleton.head_name())):
        if entry is None:
            raise CheckpointError(f"{checkpoint.folder}: no tensor for the parameter {name}; is a shard missing?")
    assert embedding is not None
    assert head is not None
    return StemTask(tuple(ModuleTensor(name, by_module[name]) for name in needed), embedding, head)


def _block(
    checkpoint: Checkpoint,
    skeleton: Skeleton,
    index: int,
    names: dict[str, str],
    matched: set[str],
    by_module: dict[str, TensorEntry],
) -> Block:
    prefix = f"{skeleton.blocks_path}.{index}."
    module = skeleton.blocks[index]
    missing = [name for name, _ in module.named_parameters() if prefix + name not in by_module]
    if missing:
        raise CheckpointError(
            f"{checkpoint.folder}: no tensor for the parameter {prefix}{missing[0]}; is a shard missing?"
        )
    tensors = tuple(ModuleTensor(name, entry) for name, entry in by_module.items() if name.startswith(prefix))
    others = tuple(
        checkpoint.tensors[disk] for disk, name in names.items() if name.startswith(prefix) and disk not in matched
    )
    linears = []
    for group, members in enumerate(skeleton.facts(index).input_groups):
        for name in members.linears:
            entry = by_module[f"{prefix}{name}.weight"]
            if entry.dtype not in FLOAT_DTYPES:
                raise CheckpointError(
                    f"{entry.path}: tensor {entry.name} has dtype {entry.dtype}; only "
                    f"{', '.join(sorted(FLOAT_DTYPES))} can be computed with: save the model in bfloat16 first"
                )
            shape = (entry.meant_shape[0], entry.meant_shape[1])
            linears.append(Linear(entry.name, name, shape, group, DTYPES[entry.dtype].itemsize))
    weights = {linear.disk_name for linear in linears}
    other_matrices = tuple(
        tensor.entry.name for tensor in tensors if len(tensor.entry.shape) > 1 and tensor.entry.name not in weights
    )
    facts = skeleton.facts(index)
    feed_forward = () if facts.feed_forward is None else facts.feed_forward.linears
    return Block(index, tensors, others, tuple(linears), facts.input_groups, other_matrices, feed_forward)
