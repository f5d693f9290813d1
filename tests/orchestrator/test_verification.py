"""A tampered byte anywhere is found."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from billhook.orchestrator import InputError, prune, verify
from billhook.orchestrator.journal import append, journal_path, read_journal
from billhook.orchestrator.output import sha256_of


@pytest.fixture(scope="module")
def pruned(llama: Path, ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("verify") / "out"
    return prune(llama, out, method="magnitude", pattern="2:4", exclude=("down_proj",), workers=1).output


@pytest.fixture
def out(pruned: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pruned, tmp_path / "out"))


def reasons(found: Any) -> str:
    return "\n".join(f"{problem.name}: {problem.reason}" for problem in found.problems)


def test_an_untouched_output_is_fine(out: Path) -> None:
    assert verify(out).ok


@pytest.mark.parametrize("name", ["config.json", "README.md", "tokenizer.json", "model-00002-of-00004.safetensors"])
@pytest.mark.parametrize("place", [0.0, 0.5, 0.999])
def test_any_changed_byte_of_any_file_is_found(out: Path, name: str, place: float) -> None:
    path = out / name
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 1
    path.write_bytes(data)
    found = verify(out)
    assert not found.ok
    assert f"{name}: its sha256 differs" in reasons(found)


def tamper(out: Path, tensor: str, change: Callable[[torch.Tensor], None]) -> None:
    """Change a tensor and make manifest and journal agree with the new hash: only the content gives it away."""
    for shard in out.glob("*.safetensors"):
        data = bytearray(shard.read_bytes())
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        if tensor in header:
            begin = 8 + int.from_bytes(data[:8], "little")
            start, stop = (begin + offset for offset in header[tensor]["data_offsets"])
            values = torch.frombuffer(data, dtype=torch.bfloat16, count=(stop - start) // 2, offset=start)
            change(values)
            shard.write_bytes(data)
            manifest_path = out / "billhook" / "manifest.json"
            manifest = json.loads(manifest_path.read_text())
            manifest["files"][shard.name] = sha256_of(shard)
            manifest_path.write_text(json.dumps(manifest))
            lines = read_journal(out)
            journal_path(out).unlink()
            lines[-1]["manifest"] = hashlib.sha256(manifest_path.read_bytes()).hexdigest()
            for line in lines:
                append(out, line.pop("kind"), line)
            return
    raise AssertionError(tensor)


PRUNED, DENSE = "model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight"


def negative_zero(values: torch.Tensor) -> None:
    values[(values == 0).nonzero()[0]] = -0.0


def not_a_number(values: torch.Tensor) -> None:
    values[(values != 0).nonzero()[0]] = float("nan")


def one_zero_less(values: torch.Tensor) -> None:
    values[(values == 0).nonzero()[0]] = 1.0


def one_bit(values: torch.Tensor) -> None:
    values.view(torch.int16)[5] ^= 1


@pytest.mark.parametrize(
    ("tensor", "change", "reason"),
    [
        (PRUNED, negative_zero, "1 negative zeros"),
        (PRUNED, not_a_number, "1 NaN or infinite"),
        (PRUNED, one_zero_less, "keeps 3 of 4 consecutive weights"),
        (PRUNED, one_zero_less, "zeros, the manifest says"),
        (DENSE, one_bit, "was not pruned, but differs from the source"),
    ],
)
def test_a_forged_hash_does_not_help(
    out: Path, tensor: str, change: Callable[[torch.Tensor], None], reason: str
) -> None:
    tamper(out, tensor, change)
    found = verify(out)
    assert not found.ok
    assert f"{tensor}: " in reasons(found)
    assert reason in reasons(found)


def test_files_too_many_and_too_few_are_found(out: Path) -> None:
    (out / "extra.txt").write_text("x")
    (out / "config.json").unlink()
    text = reasons(verify(out))
    assert "extra.txt: is not in the manifest" in text
    assert "config.json: is missing" in text


def test_a_changed_manifest_is_found(out: Path) -> None:
    path = out / "billhook" / "manifest.json"
    path.write_text(path.read_text().replace('"sparsity": 0.5', '"sparsity": 0.6'))
    assert "differs from what the journal committed" in reasons(verify(out))


def test_a_truncated_shard_is_a_problem_not_a_crash(out: Path) -> None:
    path = out / "model-00001-of-00004.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    assert not verify(out).ok


def test_another_source_is_not_the_source(out: Path, make_model: Any, llama: Path) -> None:
    assert verify(out, against=llama).ok
    found = verify(out, against=make_model(seed=5))
    assert "was not pruned, but differs from the source" in reasons(found)


def test_what_is_no_finished_run_is_refused(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no billhook run in this folder"):
        verify(llama)
    with pytest.raises(InputError, match="no billhook run in this folder"):
        verify(tmp_path / "nothing")


def test_the_pruned_tensors_are_what_was_asked(pruned: Path) -> None:
    for shard in pruned.glob("*.safetensors"):
        with safe_open(shard, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - a safetensors file is no dict
                if "proj" in name and "down_proj" not in name:
                    groups = file.get_tensor(name).view(-1, 4)
                    assert ((groups == 0).sum(dim=1) == 2).all()
