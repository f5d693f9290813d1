"""Every wrong request ends before any work, names what is wrong, and leaves no output."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from billhook.orchestrator import InputError, evaluate, prune


@pytest.fixture
def model(llama: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(llama, tmp_path / "model"))


def shards(model: Path) -> list[Path]:
    return sorted(model.glob("*.safetensors"))


def edit_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def no_such_folder(model: Path) -> None:
    shutil.rmtree(model)


def empty_folder(model: Path) -> None:
    for path in model.iterdir():
        path.unlink()


def no_config(model: Path) -> None:
    (model / "config.json").unlink()


def config_is_not_json(model: Path) -> None:
    (model / "config.json").write_text("{")


def unknown_architecture(model: Path) -> None:
    edit_json(model / "config.json", lambda c: c.update(model_type="nonesuch", architectures=["NoneSuch"]))


def not_a_language_model(model: Path) -> None:
    (model / "config.json").write_text(json.dumps({"model_type": "vit"}))


def no_model_type(model: Path) -> None:
    (model / "config.json").write_text("{}")


def missing_shard(model: Path) -> None:
    shards(model)[1].unlink()


def truncated_shard(model: Path) -> None:
    path = shards(model)[0]
    path.write_bytes(path.read_bytes()[:-1])


def shard_shorter_than_its_header(model: Path) -> None:
    shards(model)[0].write_bytes(struct.pack("<Q", 10_000) + b"{}")


def shard_of_zeros(model: Path) -> None:
    shards(model)[0].write_bytes(bytes(64))


def another_shape(model: Path) -> None:
    path = shards(model)[0]
    tensors = load_file(path)
    name = next(name for name in tensors if "proj" in name)
    tensors[name] = torch.zeros(3, 5, dtype=torch.bfloat16)
    save_file(tensors, path, metadata={"format": "pt"})


def missing_tensor(model: Path) -> None:
    path = shards(model)[1]
    tensors = load_file(path)
    name = next(name for name in tensors if "proj" in name)
    del tensors[name]
    save_file(tensors, path, metadata={"format": "pt"})
    edit_json(model / "model.safetensors.index.json", lambda c: c["weight_map"].pop(name))


def index_names_a_tensor_that_is_not_there(model: Path) -> None:
    edit_json(model / "model.safetensors.index.json", lambda c: c["weight_map"].update(ghost=shards(model)[0].name))


def only_pickles(model: Path) -> None:
    for path in [*shards(model), model / "model.safetensors.index.json"]:
        path.unlink()
    (model / "pytorch_model.bin").write_bytes(b"x")


def only_gguf(model: Path) -> None:
    for path in [*shards(model), model / "model.safetensors.index.json"]:
        path.unlink()
    (model / "model.gguf").write_bytes(b"x")


def quantised(model: Path) -> None:
    edit_json(model / "config.json", lambda c: c.update(quantization_config={"quant_method": "gptq"}))


def shard_outside(model: Path) -> None:
    outside = model.parent / "outside.safetensors"
    shutil.copy(shards(model)[0], outside)

    def change(content: dict[str, Any]) -> None:
        name = next(iter(content["weight_map"]))
        content["weight_map"][name] = "../outside.safetensors"

    edit_json(model / "model.safetensors.index.json", change)


def absolute_shard(model: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        name = next(iter(content["weight_map"]))
        content["weight_map"][name] = "/etc/passwd.safetensors"

    edit_json(model / "model.safetensors.index.json", change)


def no_tokenizer(model: Path) -> None:
    for path in model.glob("tokenizer*"):
        path.unlink()


def drop_tensor(model: Path, name: str) -> None:
    for path in shards(model):
        tensors = load_file(path)
        if tensors.pop(name, None) is not None:
            save_file(tensors, path, metadata={"format": "pt"})
    edit_json(model / "model.safetensors.index.json", lambda c: c["weight_map"].pop(name))


def no_head(model: Path) -> None:
    drop_tensor(model, "lm_head.weight")


def no_embedding(model: Path) -> None:
    drop_tensor(model, "model.embed_tokens.weight")


def integer_linear(model: Path) -> None:
    path = shards(model)[1]
    tensors = load_file(path)
    name = next(name for name in tensors if "proj" in name)
    tensors[name] = tensors[name].to(torch.int64)
    save_file(tensors, path, metadata={"format": "pt"})


def file_in_the_way(model: Path) -> None:
    (model / "billhook").write_text("x")


def another_tokenizer(model: Path) -> None:
    for path in shards(model):
        tensors = load_file(path)
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            if name in tensors:
                tensors[name] = tensors[name][:300].clone()
        save_file(tensors, path, metadata={"format": "pt"})
    edit_json(model / "config.json", lambda c: c.update(vocab_size=300, bos_token_id=0, eos_token_id=0))


MODELS: list[tuple[Callable[[Path], None], str]] = [
    (no_such_folder, r"no such folder"),
    (empty_folder, r"the folder is empty"),
    (no_config, r"no config\.json"),
    (config_is_not_json, r"config\.json: cannot be read as JSON"),
    (unknown_architecture, r"config\.json: .*nonesuch"),
    (not_a_language_model, r"config\.json: .*'vit'.* causal language model"),
    (no_model_type, r"config\.json: .*model_type"),
    (missing_shard, r"model-00002-of-0000\d\.safetensors: .*missing"),
    (truncated_shard, r"model-00001-of-0000\d\.safetensors: truncated"),
    (shard_shorter_than_its_header, r"model-00001-of-0000\d\.safetensors: .*truncated"),
    (shard_of_zeros, r"model-00001-of-0000\d\.safetensors: "),
    (another_shape, r"tensor \S+proj\.weight has shape \[3, 5\], config\.json implies \["),
    (missing_tensor, r"no tensor for the parameter model\.layers\.\d\.\S+proj\.weight"),
    (index_names_a_tensor_that_is_not_there, r"tensor ghost should lie in .* is in no shard"),
    (only_pickles, r"only pickled weights \(pytorch_model\.bin\).*save_pretrained"),
    (only_gguf, r"only GGUF weights \(model\.gguf\)"),
    (quantised, r"quantization_config names the method 'gptq'.*dequantize"),
    (shard_outside, r"lies in '\.\./outside\.safetensors'"),
    (absolute_shard, r"lies in '/etc/passwd\.safetensors'"),
    (no_head, r"no tensor for the parameter lm_head\.weight"),
    (no_embedding, r"no tensor for the parameter model\.embed_tokens\.weight"),
    (integer_linear, r"proj\.weight has dtype I64; only"),
    (file_in_the_way, r"billhook: the output needs this name"),
    (another_tokenizer, r"makes token \d+, the model's embedding has 300 rows"),
    (no_tokenizer, r"no tokenizer could be loaded.*--calibration random"),
]


@pytest.mark.parametrize(("spoil", "message"), MODELS, ids=[spoil.__name__ for spoil, _ in MODELS])
def test_bad_models(model: Path, text_file: Path, tmp_path: Path, spoil: Callable[[Path], None], message: str) -> None:
    spoil(model)
    with pytest.raises(InputError, match=message):
        prune(model, tmp_path / "out", calibration=str(text_file), samples=4, seqlen=32)
    assert not (tmp_path / "out").exists()


REQUESTS: list[tuple[dict[str, Any], str]] = [
    ({"sparsity": 1.0}, r"--sparsity 1\.0: expected a share in \[0, 1\)"),
    ({"sparsity": -0.5}, r"--sparsity -0\.5"),
    ({"sparsity": "half"}, r"option sparsity: .*'half'"),
    ({"pattern": "2:5"}, r"--pattern 2:5: model\.layers\.0\.\S+ is 64 wide, which 5 does not divide"),
    ({"pattern": "2:4", "sparsity": 0.6}, r"contradicts --pattern 2:4"),
    ({"include": ("nothing_like_this",)}, r"--include nothing_like_this: matches none of the 21 linears"),
    ({"exclude": ("nothing_like_this",)}, r"--exclude nothing_like_this: matches none"),
    ({"include": ("q_proj",), "exclude": ("q_proj",)}, r"leave nothing to prune"),
    ({"include": ("(",)}, r"--include \(: is not a regular expression"),
    ({"samples": 100_000}, r"tokens, shorter than the 3200001 that 100000 samples of 32 tokens ask for"),
    ({"method": "sparsgpt"}, r"--method sparsgpt: unknown \(did you mean 'sparsegpt'\?\)"),
    ({"options": {"dampning": 0.1}}, r"--set dampning: .*did you mean 'damping'"),
    ({"options": {"damping": "much"}}, r"--set damping=much: expected a number"),
    ({"options": {"block": 1.5}}, r"--set block=1\.5: expected a number"),
    ({"options": {"damping": 0}}, r"damping=0\.0: expected a positive number"),
    ({"seqlen": 129}, r"--seqlen 129: the model's context is 128 tokens"),
    ({"calibration": None}, r"--method sparsegpt needs calibration samples"),
    ({"calibration": "no/such/file.txt"}, r"no/such/file\.txt: no such file"),
    ({"workers": 0}, r"option workers.*at least 1"),
    ({"device": "cuda"}, r"--device cuda: torch finds no CUDA device"),
    ({"seed": 2**63}, r"option seed"),
    ({"options": {"block": float("inf")}}, r"--set block=inf: expected a number"),
    ({"colour": "red"}, r"option 'colour' is unknown"),
    ({"method": "wanda+refitt"}, r"'refitt' cannot follow a method \(did you mean 'refit'\?\)"),
    (
        {"allocation": "owl", "allocation_options": {"spread": 0.6}},
        r"spread=0\.6: expected a number between 0 and 0\.5",
    ),
    ({"allocation": "owl", "allocation_options": {"spred": 0.1}}, r"--set-allocation spred: owl has no such option"),
    ({"allocation": "erk", "allocation_options": {"spread": 0.1}}, r"--set-allocation spread: .*it has none"),
    ({"allocation_options": {"spread": 0.1}}, r"--set-allocation spread: uniform has no such option; it has none"),
    ({"allocation": "erc"}, r"--allocation erc: neither a file nor an allocator \(did you mean 'erk'\?\)"),
    (
        {"allocation": "erk", "pattern": "2:4"},
        r"--allocation erk: the pattern 2:4 takes the same share of every linear",
    ),
    ({"method": "admm", "options": {"schedule": "linear"}}, r"schedule=linear: expected 'constant' or 'cubic'"),
    ({"recipe": "no-such-recipe.yaml"}, r"--recipe no-such-recipe\.yaml: cannot be read"),
]


@pytest.mark.parametrize(("options", "message"), REQUESTS, ids=[str(options) for options, _ in REQUESTS])
def test_bad_requests(llama: Path, text_file: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    if options.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    asked = {"calibration": str(text_file), "samples": 4, "seqlen": 32, **options}
    with pytest.raises(InputError, match=message):
        prune(llama, tmp_path / "out", **asked)
    assert not (tmp_path / "out").exists()


def test_a_folder_with_somebody_elses_files_is_not_touched(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("precious")
    with pytest.raises(InputError, match="not empty and holds no billhook run"):
        prune(llama, out, method="magnitude")
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("inside", [".", "pruned"])
def test_the_source_is_never_the_output(llama: Path, tmp_path: Path, inside: str) -> None:
    before = sorted(path.name for path in llama.iterdir())
    with pytest.raises(InputError, match="source model's folder"):
        prune(llama, llama / inside, method="magnitude")
    assert sorted(path.name for path in llama.iterdir()) == before


def test_a_second_driver_on_the_same_output_is_refused(llama: Path, tmp_path: Path) -> None:
    from billhook.orchestrator.output import locked

    with locked(tmp_path / "out"), pytest.raises(InputError, match="another billhook is writing to it"):
        prune(llama, tmp_path / "out", method="magnitude")


def test_remote_code_is_run_on_request_only(model: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    (model / "configuration_evil.py").write_text(
        f"open({str(marker)!r}, 'w').close()\nfrom transformers import LlamaConfig\n"
        "class Evil(LlamaConfig):\n    pass\n"
    )
    edit_json(
        model / "config.json",
        lambda c: c.update(model_type="evil", auto_map={"AutoConfig": "configuration_evil.Evil"}),
    )
    with pytest.raises(InputError, match="--trust-remote-code"):
        prune(model, tmp_path / "out", method="magnitude")
    assert not marker.exists()


def test_a_link_as_output_is_emptied_again(model: Path, tmp_path: Path, ray_cluster: None) -> None:
    for path in shards(model):
        tensors = load_file(path)
        for name in tensors:
            if "layers.0." in name:
                tensors[name].fill_(float("nan"))
        save_file(tensors, path, metadata={"format": "pt"})
    real, link = tmp_path / "real", tmp_path / "link"
    real.mkdir()
    link.symlink_to(real)
    with pytest.raises(InputError, match="holds NaN"):
        prune(model, link, method="magnitude", workers=1)
    assert list(real.iterdir()) == []


@pytest.mark.parametrize("output", ["~nosuchuser/x", "loop"])
def test_paths_that_are_none_are_refused(
    llama: Path, tmp_path: Path, output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(InputError, match="is no path"):
        prune(llama, output, method="magnitude")


def test_a_changed_config_is_another_plan(model: Path, tmp_path: Path, ray_cluster: None) -> None:
    prune(model, tmp_path / "out", method="magnitude", workers=1)
    edit_json(model / "config.json", lambda c: c.update(rms_norm_eps=0.5))
    with pytest.raises(InputError, match="another source checkpoint, or it was changed since; checkpoint"):
        prune(model, tmp_path / "out", method="magnitude", workers=1)


@pytest.mark.parametrize("options", [{"workers": 0}, {"threads": 0}, {"windows": 0}, {"seqlen": 1}])
def test_bad_evaluations(llama: Path, text_file: Path, options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="expected at least"):
        evaluate(llama, text_file, **{"seqlen": 32, "windows": 1, **options})
