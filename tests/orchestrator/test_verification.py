"""A tampered byte anywhere is found."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tampering import forge_hashes, read_shard, write_shard

from billhook.orchestrator import InputError, verify
from billhook.orchestrator.journal import append, journal_path, read_journal


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
    for shard in out.glob("*.safetensors"):
        header, data = read_shard(shard)
        if tensor in header:
            start, stop = header[tensor]["data_offsets"]
            change(torch.frombuffer(data, dtype=torch.bfloat16, count=(stop - start) // 2, offset=start))
            write_shard(shard, header, data)
            forge_hashes(out)
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


def recommit(out: Path, manifest: dict[str, Any]) -> None:
    """Write another manifest, and the journal's last line for it."""
    (out / "billhook" / "manifest.json").write_text(json.dumps(manifest))
    forge_hashes(out)


def test_a_manifest_that_contradicts_the_journal_is_found(out: Path) -> None:
    manifest = json.loads((out / "billhook" / "manifest.json").read_text())
    recommit(out, {**manifest, "linears": manifest["linears"][1:]})
    assert "its 'linears' differs from the journal's" in reasons(verify(out))
    recommit(out, {**manifest, "recipe": {**manifest["recipe"], "seed": 7}})
    assert "its 'recipe' differs from the journal's" in reasons(verify(out))
    recommit(out, manifest)
    assert verify(out).ok


def test_a_count_that_was_not_asked_for_is_found(out: Path) -> None:
    lines = read_journal(out)
    journal_path(out).unlink()
    for line in lines:
        if line["kind"] == "block":
            line["linears"][0]["removed"] -= 1
        append(out, line.pop("kind"), line)
    assert "lost 2047 of 4096 weights, pattern 2:4" in reasons(verify(out))


def test_what_follows_the_journal_is_found(out: Path) -> None:
    with journal_path(out).open("ab") as journal:
        journal.write(b"x")
    assert "something follows its last line" in reasons(verify(out))


def test_a_folder_in_the_place_of_a_file_is_a_problem_not_a_crash(out: Path) -> None:
    (out / "config.json").unlink()
    (out / "config.json").mkdir()
    assert "config.json: Is a directory" in reasons(verify(out))


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


def test_the_pruned_tensors_are_what_was_asked(finished: Path) -> None:
    for shard in finished.glob("*.safetensors"):
        with safe_open(shard, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - a safetensors file is no dict
                if "proj" in name and "down_proj" not in name:
                    groups = file.get_tensor(name).view(-1, 4)
                    assert ((groups == 0).sum(dim=1) == 2).all()
