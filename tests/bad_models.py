"""Ways in which a model's folder can be broken; each is a function that spoils a good one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tampering import read_shard, write_shard

INDEX = "model.safetensors.index.json"


def shards(model: Path) -> list[Path]:
    return sorted(model.glob("*.safetensors"))


def edit_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_header(model: Path, change: Callable[[dict[str, Any], str], None]) -> None:
    """Change the header of the first shard; ``change`` also gets the name of its second tensor."""
    path = shards(model)[0]
    header, data = read_shard(path)
    change(header, [name for name in header if name != "__metadata__"][1])
    write_shard(path, header, data)


def edit_tensors(path: Path, change: Callable[[dict[str, torch.Tensor], str], None]) -> None:
    """Change the tensors of a shard; ``change`` also gets the name of one of its linears' weights."""
    tensors = load_file(path)
    change(tensors, next((name for name in tensors if "proj" in name), ""))
    save_file(tensors, path, metadata={"format": "pt"})


def set_config(**values: Any) -> Callable[[Path], None]:
    """Return what sets keys of config.json."""
    return lambda model: edit_json(model / "config.json", lambda config: config.update(values))


def write(name: str, content: str | bytes) -> Callable[[Path], None]:
    """Return what overwrites a file of the model."""
    data = content if isinstance(content, bytes) else content.encode()

    def spoil(model: Path) -> None:
        (model / name).write_bytes(data)

    return spoil


def write_first_shard(data: bytes) -> Callable[[Path], None]:
    def spoil(model: Path) -> None:
        shards(model)[0].write_bytes(data)

    return spoil


def in_index(place: Callable[[Path], Any]) -> Callable[[Path], None]:
    """Return what says in the index that its first tensor lies somewhere else."""

    def spoil(model: Path) -> None:
        def change(content: dict[str, Any]) -> None:
            content["weight_map"][next(iter(content["weight_map"]))] = place(model)

        edit_json(model / INDEX, change)

    return spoil


def remove(pattern: str) -> Callable[[Path], None]:
    def spoil(model: Path) -> None:
        for path in model.glob(pattern):
            path.unlink()

    return spoil


def is_gone(model: Path) -> None:
    shutil.rmtree(model)


def is_a_file(model: Path) -> None:
    shutil.rmtree(model)
    model.write_text("x")


def is_a_loop(model: Path) -> None:
    shutil.rmtree(model)
    model.symlink_to(model.name)


def without_weights_but(name: str) -> Callable[[Path], None]:
    def spoil(model: Path) -> None:
        for path in [*shards(model), model / INDEX]:
            path.unlink()
        (model / name).write_bytes(b"x")

    return spoil


def missing_shard(model: Path) -> None:
    shards(model)[1].unlink()


def shard_is_a_folder(model: Path) -> None:
    shards(model)[1].unlink()
    (model / "model-00002-of-00004.safetensors").mkdir()


def shard_is_a_loop(model: Path) -> None:
    path = shards(model)[1]
    path.unlink()
    path.symlink_to(path.name)


def shard_is_a_broken_link(model: Path) -> None:
    path = shards(model)[1]
    path.unlink()
    path.symlink_to("/nonexistent/blob")


def truncated_shard(model: Path) -> None:
    shards(model)[0].write_bytes(shards(model)[0].read_bytes()[:-1])


def padded_shard(model: Path) -> None:
    shards(model)[0].write_bytes(shards(model)[0].read_bytes() + b"x")


def header_of_another_length(model: Path) -> None:
    data = shards(model)[0].read_bytes()
    shards(model)[0].write_bytes((int.from_bytes(data[:8], "little") - 9).to_bytes(8, "little") + data[8:])


def overlapping_tensors(model: Path) -> None:
    edit_header(model, lambda header, name: header[name].update(data_offsets=[0, header[name]["data_offsets"][1]]))


def hole_between_tensors(model: Path) -> None:
    edit_header(model, lambda header, name: header.pop(name))


def tensor_beyond_the_file(model: Path) -> None:
    def change(header: dict[str, Any], name: str) -> None:
        size = header[name]["data_offsets"][1] - header[name]["data_offsets"][0]
        header[name]["data_offsets"] = [1 << 40, (1 << 40) + size]

    edit_header(model, change)


def negative_offset(model: Path) -> None:
    edit_header(model, lambda header, name: header[name].update(data_offsets=[-8, 8]))


def fewer_bytes_than_the_shape(model: Path) -> None:
    edit_header(model, lambda header, name: header[name].update(shape=[7, 7]))


def shape_is_no_list(model: Path) -> None:
    edit_header(model, lambda header, name: header[name].update(shape="64x64"))


def unknown_dtype(model: Path) -> None:
    edit_header(model, lambda header, name: header[name].update(dtype="F12"))


def no_dtype(model: Path) -> None:
    edit_header(model, lambda header, name: header[name].pop("dtype"))


def name_twice_in_a_header(model: Path) -> None:
    header, data = read_shard(shards(model)[0])
    first, second = [name for name in header if name != "__metadata__"][:2]
    text = json.dumps(header).replace(json.dumps(second), json.dumps(first)).encode()
    shards(model)[0].write_bytes(len(text).to_bytes(8, "little") + text + data)


def name_that_moves_the_cursor(model: Path) -> None:
    edit_header(model, lambda header, name: header.update({"\x1b[2J": header.pop(name)}))


def name_in_two_shards(model: Path) -> None:
    name, tensor = next(iter(load_file(shards(model)[0]).items()))
    edit_tensors(shards(model)[1], lambda tensors, _: tensors.update({name: tensor}))


def another_shape(model: Path) -> None:
    edit_tensors(shards(model)[1], lambda tensors, name: tensors.update({name: torch.zeros(3, 5)}))


def empty_tensor(model: Path) -> None:
    edit_tensors(shards(model)[1], lambda tensors, name: tensors.update({name: torch.zeros(0, 64)}))


def integer_linear(model: Path) -> None:
    edit_tensors(shards(model)[1], lambda tensors, name: tensors.update({name: tensors[name].to(torch.int64)}))


def eight_bit_linear(model: Path) -> None:
    edit_tensors(shards(model)[1], lambda tensors, name: tensors.update({name: tensors[name].to(torch.float8_e4m3fn)}))


def drop_tensor(name: str) -> Callable[[Path], None]:
    """Return what takes a tensor out of its shard and the index."""

    def spoil(model: Path) -> None:
        for path in shards(model):
            tensors = load_file(path)
            if tensors.pop(name, None) is not None:
                save_file(tensors, path, metadata={"format": "pt"})
        edit_json(model / INDEX, lambda index: index["weight_map"].pop(name))

    return spoil


def another_shard_in_the_index(model: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        tensor, name = next(iter(content["weight_map"].items()))
        content["weight_map"][tensor] = next(other.name for other in shards(model) if other.name != name)

    edit_json(model / INDEX, change)


def ghost_in_the_index(model: Path) -> None:
    edit_json(model / INDEX, lambda index: index["weight_map"].update(ghost=shards(model)[0].name))


def outside_the_folder(model: Path) -> str:
    shutil.copy(shards(model)[0], model.parent / "outside.safetensors")
    return "../outside.safetensors"


def another_tokenizer(model: Path) -> None:
    def cut(tensors: dict[str, torch.Tensor], _: str) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            if name in tensors:
                tensors[name] = tensors[name][:300].clone()

    for path in shards(model):
        edit_tensors(path, cut)
    edit_json(model / "config.json", lambda c: c.update(vocab_size=300, bos_token_id=0, eos_token_id=0))
