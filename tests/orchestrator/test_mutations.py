"""200 random corruptions of a finished output, each alone: ``verify`` finds every one."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tampering import forge_hashes, read_shard, write_shard

from billhook.orchestrator import InputError, verify

SINGLE_BYTES, OTHERS = 100, 100

Header = dict[str, Any]


class Shard:
    """A shard of an output, one tensor of which is to be spoiled."""

    def __init__(self, path: Path, dice: random.Random, pruned: set[str], forged: bool):
        """forged: the hashes will agree with what was done, so it is done where the content can tell."""
        self.path, self.dice, self.forged = path, dice, forged
        self.header, self.data = read_shard(path)
        names = [name for name in self.header if name != "__metadata__"]
        self.pruned = [name for name in names if name in pruned]
        self.dense = [name for name in names if name not in pruned]
        self.name = dice.choice(names)

    def values(self, name: str) -> torch.Tensor:
        start, stop = self.header[name]["data_offsets"]
        return torch.frombuffer(self.data, dtype=torch.bfloat16, count=(stop - start) // 2, offset=start)

    def pick(self, where: torch.Tensor) -> int:
        return int(self.dice.choice(where.nonzero().flatten().tolist()))

    def close(self) -> None:
        write_shard(self.path, self.header, self.data)


def drop(shard: Shard) -> None:
    start, stop = shard.header.pop(shard.name)["data_offsets"]
    del shard.data[start:stop]
    for entry in shard.header.values():
        if "data_offsets" in entry and entry["data_offsets"][0] >= stop:
            entry["data_offsets"] = [offset - (stop - start) for offset in entry["data_offsets"]]


def rename(shard: Shard) -> None:
    shard.header[f"{shard.name}_"] = shard.header.pop(shard.name)


def another_dtype(shard: Shard) -> None:
    shard.header[shard.name]["dtype"] = "F16"


def another_shape(shard: Shard) -> None:
    shard.header[shard.name]["shape"] = [1, *shard.header[shard.name]["shape"]]


def swap(shard: Shard) -> None:
    """Swap two tensors' names."""
    names = shard.dense if shard.forged else [*shard.dense, *shard.pruned]
    one = shard.dice.choice(names)
    other = shard.dice.choice([name for name in shard.header if name not in ("__metadata__", one)])
    shard.header[one], shard.header[other] = shard.header[other], shard.header[one]


def replace(shard: Shard) -> None:
    """Put another tensor's bytes in its place, as many as there is room for."""
    one = shard.dice.choice(shard.dense if shard.forged else [*shard.dense, *shard.pruned])
    other = shard.dice.choice([name for name in shard.header if name not in ("__metadata__", one)])
    count = min(len(shard.values(one)), len(shard.values(other)))
    shard.values(one)[:count] = shard.values(other)[:count].clone()


def all_zero(shard: Shard) -> None:
    shard.values(shard.name).zero_()


def one_weight_back(shard: Shard) -> None:
    values = shard.values(shard.dice.choice(shard.pruned))
    values[shard.pick(values == 0)] = 0.5


def one_weight_less(shard: Shard) -> None:
    values = shard.values(shard.dice.choice(shard.pruned))
    values[shard.pick(values != 0)] = 0.0


def not_a_number(shard: Shard) -> None:
    values = shard.values(shard.name)
    values[shard.dice.randrange(len(values))] = float("nan")


def negative_zero(shard: Shard) -> None:
    values = shard.values(shard.dice.choice(shard.pruned))
    values[shard.pick(values == 0)] = -0.0


def one_bit(shard: Shard) -> None:
    values = shard.values(shard.dice.choice(shard.dense if shard.forged else [*shard.dense, *shard.pruned]))
    values.view(torch.int16)[shard.dice.randrange(len(values))] ^= 1 << shard.dice.randrange(15)


TENSORS: list[Callable[[Shard], None]] = [
    drop, rename, another_dtype, another_shape, swap, replace, all_zero, one_weight_back, one_weight_less,
    not_a_number, negative_zero, one_bit,
]  # fmt: skip


def truncated(path: Path, dice: random.Random) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: dice.randrange(len(data))])


def appended(path: Path, dice: random.Random) -> None:
    path.write_bytes(path.read_bytes() + bytes(dice.randrange(256) for _ in range(dice.choice([1, 8]))))


def removed(path: Path, dice: random.Random) -> None:
    path.unlink()


def added(path: Path, dice: random.Random) -> None:
    (path.parent / f"other-{path.name}").write_bytes(path.read_bytes())


FILES: list[Callable[[Path, random.Random], None]] = [truncated, appended, removed, added]


@pytest.fixture(scope="module")
def intact(finished: Path) -> dict[Path, bytes]:
    """What is under the proof, by its path in the output."""
    private = [Path("billhook/journal.jsonl"), Path("billhook/manifest.json")]
    names = [path.relative_to(finished) for path in sorted(finished.iterdir()) if path.is_file()]
    return {path: (finished / path).read_bytes() for path in [*names, *private]}


def is_found(out: Path) -> bool:
    try:
        return not verify(out).ok
    except InputError:
        return True


def put_back(out: Path, intact: dict[Path, bytes]) -> None:
    for path in out.iterdir():
        if path.is_file() and path.relative_to(out) not in intact:
            path.unlink()
    for path, data in intact.items():
        if not (out / path).is_file() or (out / path).read_bytes() != data:
            (out / path).write_bytes(data)


def test_every_changed_byte_is_found(out: Path, intact: dict[Path, bytes]) -> None:
    dice = random.Random(1)
    for _ in range(SINGLE_BYTES):
        path = dice.choice(list(intact))
        data = bytearray(intact[path])
        # A shard's header is a small part of it, but as good a place as any.
        header = 8 + int.from_bytes(data[:8], "little") if path.suffix == ".safetensors" else len(data)
        place = dice.randrange(dice.choice([header, len(data)]))
        data[place] ^= dice.randrange(1, 256)
        (out / path).write_bytes(data)
        assert is_found(out), f"byte {place} of {path} is now {data[place]}"
        (out / path).write_bytes(intact[path])
    assert verify(out).ok


def test_every_changed_tensor_and_file_is_found(out: Path, intact: dict[Path, bytes]) -> None:
    """Half of the tensors are changed with hashes that agree with it: their content gives them away."""
    dice = random.Random(2)
    linears = json.loads(intact[Path("billhook/manifest.json")])["linears"]
    pruned = {linear["name"] for linear in linears}
    shards = [path for path in intact if path.suffix == ".safetensors"]
    of_blocks = [path for path in shards if pruned & set(read_shard(out / path)[0])]
    kinds = [*TENSORS, *FILES]
    for number in range(OTHERS):
        kind: Any = kinds[number % len(kinds)]
        forged = kind in TENSORS and number // len(kinds) % 2 == 1
        if kind in TENSORS:
            path = dice.choice(of_blocks)
            shard = Shard(out / path, dice, pruned, forged)
            what = f"{kind.__name__} in {path}{', forged' if forged else ''}"
            kind(shard)
            shard.close()
        else:
            # The private folder holds more than is proved.
            path = dice.choice([path for path in intact if kind is not added or path.parent == Path()])
            what = f"{kind.__name__} {path}"
            kind(out / path, dice)
        assert kind is added or not (out / path).is_file() or (out / path).read_bytes() != intact[path], what
        if forged:
            forge_hashes(out)
        assert is_found(out), what
        put_back(out, intact)
    assert verify(out).ok
