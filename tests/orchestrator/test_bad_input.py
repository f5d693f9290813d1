"""Bad input, one row of a table for each kind: exit code 2, a message that says what and where, nothing written."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import bad_models as spoil
import pytest
import torch
from safetensors.torch import load_file, save_file

from billhook.orchestrator import InputError, cli, prune


@dataclass(frozen=True)
class Bad:
    """One kind of bad input."""

    name: str
    command: str
    """Given in a folder with ``model``, ``out`` (a finished output, where there is an O in ``needs``), ``text.txt``."""
    code: str | None
    """None: the command line cannot be parsed."""
    message: str
    """Regex that is found in the line on standard error."""
    arrange: Callable[[Path], object] = lambda place: None
    needs: str = "M"
    """M: a model of its own to spoil; O: a finished output."""


MAGNITUDE = "prune model -o new --method magnitude --workers 1"
FITTED = "prune model -o new --method wanda --samples 4 --seqlen 32 --workers 1 --calibration"


def model(name: str, spoiled: Callable[[Path], object], message: str, code: str = "bad-checkpoint") -> Bad:
    """Return a row for a model that is broken."""
    return Bad(f"model: {name}", MAGNITUDE, code, message, lambda place: spoiled(place / "model"))


def option(command: str, message: str, code: str | None = "bad-option") -> Bad:
    """Return a row for options that are wrong, of a good model."""
    return Bad(command, command, code, message, needs="")


def file(name: str, content: str | bytes) -> Callable[[Path], object]:
    """Return what writes a file beside the model."""
    return lambda place: (place / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def run(
    name: str, command: str, code: str, message: str, arrange: Callable[[Path], object] = lambda place: None
) -> Bad:
    """Return a row for a finished output."""
    return Bad(f"run: {name}", command, code, message, arrange, "O")


SHARD = r"model-00001-of-0000\d\.safetensors: "
UNFIT = "unsupported-model"

MODELS = [
    model("no such folder", spoil.is_gone, r"model: no such folder"),
    model("is a file", spoil.is_a_file, r"model: is a file"),
    model("is a loop of links", spoil.is_a_loop, r"model: is no path", "bad-option"),
    model("empty folder", spoil.remove("*"), r"model: the folder is empty"),
    model("no config", spoil.remove("config.json"), r"no config\.json"),
    model("config is not JSON", spoil.write("config.json", "{"), r"config\.json: cannot be read as JSON"),
    model("config is a list", spoil.write("config.json", "[]"), r"config\.json: expected a JSON object, found list"),
    model("config is not UTF-8", spoil.write("config.json", b"\xff\xfe{"), r"config\.json: cannot be read as JSON"),
    model("config without model_type", spoil.write("config.json", "{}"), r"config\.json: .*model_type", UNFIT),
    model("unknown architecture", spoil.set_config(model_type="nonesuch"), r"config\.json: .*nonesuch", UNFIT),
    model(
        "no language model",
        spoil.write("config.json", '{"model_type": "vit"}'),
        r"config\.json: .*'vit'.* causal language model",
        UNFIT,
    ),
    model("config of another width", spoil.set_config(hidden_size=128), r"has shape \[.*config\.json implies \["),
    model("config of more blocks", spoil.set_config(num_hidden_layers=5), r"no tensor for the parameter .*layers\.3"),
    model("config of no blocks", spoil.set_config(num_hidden_layers=0), r"config\.json: .*num_hidden_layers", UNFIT),
    model(
        "config with a word for a number", spoil.set_config(hidden_size="big"), r"config\.json: .*hidden_size", UNFIT
    ),
    model("config of a negative width", spoil.set_config(intermediate_size=-4), r"config\.json: ", UNFIT),
    model(
        "config with a wrong activation", spoil.set_config(hidden_act="nonesuch"), r"config\.json: .*nonesuch", UNFIT
    ),
    model(
        "quantised",
        spoil.set_config(quantization_config={"quant_method": "gptq"}),
        r"quantization_config names the method 'gptq'.*dequantize",
        UNFIT,
    ),
    model("only pickles", spoil.without_weights_but("pytorch_model.bin"), r"only pickled weights .*save_pre", UNFIT),
    model("only GGUF", spoil.without_weights_but("model.gguf"), r"only GGUF weights \(model\.gguf\)", UNFIT),
    model("no weights", spoil.without_weights_but("notes.txt"), r"neither model\.safetensors\.index\.json nor"),
    model("missing shard", spoil.missing_shard, r"model-00002-of-0000\d\.safetensors: .*missing"),
    model("shard is a folder", spoil.shard_is_a_folder, r"model-00002-of-0000\d\.safetensors: "),
    model("shard is a loop of links", spoil.shard_is_a_loop, r"model-00002-of-0000\d\.safetensors: "),
    model("shard is a broken link", spoil.shard_is_a_broken_link, r"model-00002-of-0000\d\.safetensors: .*missing"),
    model("truncated shard", spoil.truncated_shard, SHARD + "truncated"),
    model("padded shard", spoil.padded_shard, SHARD + "truncated or padded"),
    model("empty shard", spoil.write_first_shard(b""), SHARD + "not a safetensors file: 0 bytes"),
    model("shard of zeros", spoil.write_first_shard(bytes(64)), SHARD),
    model("shard shorter than its header", spoil.write_first_shard((10_000).to_bytes(8, "little") + b"{}"), SHARD),
    model(
        "header of 2^60 bytes", spoil.write_first_shard((1 << 60).to_bytes(8, "little") + b"{}"), SHARD + "its header"
    ),
    model("header cut off", spoil.header_of_another_length, SHARD + "the safetensors header cannot be read"),
    model(
        "header is a list", spoil.write_first_shard((2).to_bytes(8, "little") + b"[]"), SHARD + "the safetensors header"
    ),
    model("header nested too deep", spoil.write_first_shard((90_000).to_bytes(8, "little") + b"[" * 90_000), SHARD),
    model("overlapping tensors", spoil.overlapping_tensors, SHARD),
    model("hole between tensors", spoil.hole_between_tensors, SHARD),
    model("tensor beyond the file", spoil.tensor_beyond_the_file, SHARD + "truncated"),
    model("negative offset", spoil.negative_offset, SHARD),
    model("fewer bytes than the shape says", spoil.fewer_bytes_than_the_shape, SHARD),
    model("shape is no list", spoil.shape_is_no_list, SHARD),
    model("unknown dtype", spoil.unknown_dtype, SHARD),
    model("no dtype", spoil.no_dtype, SHARD + "the safetensors header cannot be read"),
    model("a name twice in a header", spoil.name_twice_in_a_header, SHARD),
    model(
        "a name that moves the cursor", spoil.name_that_moves_the_cursor, SHARD + r"the tensor name '\\x1b\[2J' holds"
    ),
    model(
        "a name in two shards", spoil.name_in_two_shards, r"model: tensor \S+ lies in both model-00001.*and model-00002"
    ),
    model("another shape", spoil.another_shape, r"proj\.weight has shape \[3, 5\], config\.json implies \["),
    model("empty tensor", spoil.empty_tensor, r"proj\.weight has shape \[0, 64\], config\.json implies \["),
    model("integer linear", spoil.integer_linear, r"proj\.weight has dtype I64; only"),
    model("8-bit linear", spoil.eight_bit_linear, r"proj\.weight has dtype F8_E4M3; only"),
    model(
        "missing tensor",
        spoil.drop_tensor("model.layers.1.mlp.up_proj.weight"),
        r"no tensor for the parameter model\.layers\.1\.mlp\.up_proj\.weight",
    ),
    model("no head", spoil.drop_tensor("lm_head.weight"), r"no tensor for the parameter lm_head\.weight"),
    model("no embedding", spoil.drop_tensor("model.embed_tokens.weight"), r"no tensor .* model\.embed_tokens\.weight"),
    model("index is not JSON", spoil.write(spoil.INDEX, "{"), r"index\.json: cannot be read as a safetensors index"),
    model("index without weight_map", spoil.write(spoil.INDEX, "{}"), r"index\.json: cannot be read .*weight_map"),
    model("index of nothing", spoil.write(spoil.INDEX, '{"weight_map": {}}'), r"weight_map must map"),
    model("index to a number", spoil.in_index(lambda model: 3), r"index\.json: weight_map must map tensor names"),
    model("index to a pickle", spoil.in_index(lambda model: "x.bin"), r"lies in 'x\.bin'; expected .*\.safetensors"),
    model("index leaves the folder", spoil.in_index(spoil.outside_the_folder), r"lies in '\.\./outside\.safetensors'"),
    model("index is absolute", spoil.in_index(lambda model: "/etc/x.safetensors"), r"lies in '/etc/x\.safetensors'"),
    model(
        "index names another shard",
        spoil.another_shard_in_the_index,
        r"index\.json: tensor \S+ should lie in model-0000\d.*, but it lies in model-0000\d",
    ),
    model("ghost in the index", spoil.ghost_in_the_index, r"index\.json: tensor ghost should lie in .* is in no shard"),
    pytest.param(
        model("may not be read", lambda model: spoil.shards(model)[0].chmod(0), SHARD + "cannot be read: Permission"),
        marks=pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything"),
    ),
    model("file in the way", spoil.write("billhook", "x"), r"billhook: the output needs this name", "bad-output"),
]

TEXTS = [
    Bad(
        "text: none", FITTED.replace(" --calibration", ""), "bad-option", r"--method wanda needs calibration", needs=""
    ),
    Bad("text: missing", f"{FITTED} no/such.txt", "bad-text", r"no/such\.txt: no such file", needs=""),
    Bad("text: no dataset", f"{FITTED} nobodys-data", "bad-text", r"nobodys-data: no such file", needs=""),
    Bad("text: a folder", f"{FITTED} folder", "bad-text", r"folder: ", lambda place: (place / "folder").mkdir(), ""),
    Bad("text: empty", f"{FITTED} empty.txt", "bad-text", r"empty\.txt: 0 tokens, shorter", file("empty.txt", ""), ""),
    Bad("text: short", f"{FITTED} x.txt", "bad-text", r"x\.txt: \d+ tokens, shorter", file("x.txt", "Short."), ""),
    Bad("text: not UTF-8", f"{FITTED} x.txt", "bad-text", r"x\.txt: is not UTF-8", file("x.txt", b"\xff" * 99), ""),
    Bad(
        "text: not JSONL",
        f"{FITTED} x.jsonl",
        "bad-text",
        r"x\.jsonl, line 1: is not a JSON",
        file("x.jsonl", "x\n"),
        "",
    ),
    Bad(
        "text: JSONL of lists",
        f"{FITTED} x.jsonl",
        "bad-text",
        r"x\.jsonl, line 2: is not a JSON object",
        file("x.jsonl", '{"text": "a"}\n[1]\n'),
        "",
    ),
    Bad(
        "text: JSONL without the field",
        f"{FITTED} x.jsonl --field body",
        "bad-text",
        r"x\.jsonl, line 1: has no field 'body'; name it with --field",
        file("x.jsonl", '{"text": "a"}\n'),
        "",
    ),
    Bad(
        "text: JSONL with a number",
        f"{FITTED} x.jsonl",
        "bad-text",
        r"line 1: field 'text' holds int, expected text",
        file("x.jsonl", '{"text": 3}\n'),
        "",
    ),
    Bad(
        "text: half a character",
        f"{FITTED} x.jsonl",
        "bad-text",
        r"line 1: field 'text' holds half of a surrogate pair",
        file("x.jsonl", '{"text": "\\ud800"}\n'),
        "",
    ),
    Bad(
        "tokenizer: none",
        f"{FITTED} text.txt",
        "bad-text",
        r"no tokenizer could be loaded.*--calibration random",
        lambda place: spoil.remove("tokenizer*")(place / "model"),
    ),
    Bad(
        "tokenizer: broken",
        f"{FITTED} text.txt",
        "bad-text",
        r"no tokenizer could be loaded",
        lambda place: spoil.write("tokenizer.json", "{")(place / "model"),
    ),
    Bad(
        "tokenizer: of another model",
        f"{FITTED} text.txt",
        "bad-text",
        r"makes token \d+, the model's embedding has 300 rows",
        lambda place: spoil.another_tokenizer(place / "model"),
    ),
]

CALIBRATED = f"{FITTED} text.txt"
OPTIONS = [
    option(f"{CALIBRATED} --sparsity 1.0", r"--sparsity 1\.0: expected a share in \[0, 1\)"),
    option(f"{CALIBRATED} --sparsity -0.5", r"--sparsity -0\.5: expected a share"),
    option(f"{CALIBRATED} --sparsity nan", r"--sparsity nan: expected a share"),
    option(f"{CALIBRATED} --sparsity half", r"'--sparsity'.* number", None),
    option(f"{CALIBRATED} --pattern 2/4", r"--pattern 2/4: expected 'unstructured' or N:M"),
    option(f"{CALIBRATED} --pattern 4:2", r"--pattern 4:2: N counts the weights kept"),
    option(f"{CALIBRATED} --pattern 0:4", r"--pattern 0:4: N counts the weights kept"),
    option(f"{CALIBRATED} --pattern 2:5", r"--pattern 2:5: model\.layers\.0\.\S+ is 64 wide, which 5 does not divide"),
    option(f"{CALIBRATED} --pattern 2:4 --sparsity 0.6", r"--sparsity 0\.6 contradicts --pattern 2:4"),
    option(f"{CALIBRATED} --include nothing_like_this", r"--include nothing_like_this: matches none of the 21 linears"),
    option(f"{CALIBRATED} --exclude nothing_like_this", r"--exclude nothing_like_this: matches none"),
    option(f"{CALIBRATED} --include q_proj --exclude q_proj", r"--include and --exclude together leave nothing"),
    option(f"{CALIBRATED} --include (", r"--include \(: is not a regular expression"),
    option(f"{CALIBRATED} --samples 100000", r"tokens, shorter than the 3200001 that 100000 samples", "bad-text"),
    option(f"{CALIBRATED} --samples 0", r"option samples: .* found 0"),
    option(f"{CALIBRATED} --seqlen 129", r"--seqlen 129: the model's context is 128 tokens"),
    option(f"{CALIBRATED} --seqlen 1", r"option seqlen: .* found 1"),
    option(f"{CALIBRATED} --seed -1", r"option seed: .* found -1"),
    option(f"{CALIBRATED} --method sparsgpt", r"--method sparsgpt: unknown \(did you mean 'sparsegpt'\?\)"),
    option(f"{CALIBRATED} --method wanda+refitt", r"'refitt' cannot follow a method \(did you mean 'refit'\?\)"),
    option(f"{CALIBRATED} --set dampning=0.1", r"--set dampning: wanda has no such option"),
    option(f"{CALIBRATED} --method sparsegpt --set damping=much", r"--set damping=much: expected a number"),
    option(f"{CALIBRATED} --method sparsegpt --set block=1.5", r"--set block=1\.5: expected a number"),
    option(f"{CALIBRATED} --method sparsegpt --set block=inf", r"--set block=inf: expected a number"),
    option(f"{CALIBRATED} --method sparsegpt --set damping=0", r"damping=0\.0: expected a positive number"),
    option(f"{CALIBRATED} --method admm --set schedule=linear", r"schedule=linear: expected 'constant' or 'cubic'"),
    option(f"{CALIBRATED} --set damping", r"--set damping: expected NAME=VALUE"),
    option(
        f"{CALIBRATED} --method auto --fit dense-block", r"--correction 0\.5: what is fitted to the dense block sees"
    ),
    option(
        f"{CALIBRATED} --correction 0.5 --fit dense-block", r"--correction 0\.5: what is fitted to the dense block sees"
    ),
    option(f"{CALIBRATED} --method wanda+dsnot --fit lockstep --correction 0.5", r"wanda\+dsnot asks for \(moments\)"),
    option(f"{MAGNITUDE} --fit lockstep --correction 0.5", r"magnitude asks for \(no calibration\)"),
    option(f"{CALIBRATED} --method sparsegpt --correction 1.5", r"option correction: .* found 1\.5"),
    option(f"{CALIBRATED} --method sparsegpt --correction -0.1", r"option correction: .* found -0\.1"),
    option(f"{CALIBRATED} --method sparsegpt --correction nan", r"option correction: .* found nan"),
    option(f"{CALIBRATED} --allocation erc", r"--allocation erc: neither a file nor an allocator \(did you mean 'erk'"),
    option(f"{CALIBRATED} --allocation erk --pattern 2:4", r"--allocation erk: the pattern 2:4 takes the same share"),
    option(f"{CALIBRATED} --allocation owl --set-allocation spread=0.6", r"spread=0\.6: expected a number between"),
    option(f"{CALIBRATED} --allocation owl --set-allocation spred=0.1", r"--set-allocation spred: owl has no such"),
    option(f"{CALIBRATED} --set-allocation spread=0.1", r"--set-allocation spread: uniform has no such option"),
    option(f"{CALIBRATED} --workers 0", r"option workers: expected at least 1"),
    option(f"{CALIBRATED} --workers many", r"--workers many: expected one of a number, 'auto'"),
    option(f"{CALIBRATED} --threads 0", r"option threads: .* found 0"),
    option(f"{CALIBRATED} --ram 16", r"option ram: expected a size with its unit, as 16GiB, found '16'"),
    option(f"{CALIBRATED} --ram much", r"option ram: expected a size with its unit"),
    option(
        f"{CALIBRATED} --ram 20MiB", r"--ram .*: too small for the largest phase .* smallest budget", "does-not-fit"
    ),
    option(f"{CALIBRATED} --disk 100KiB", r"--disk: ", "does-not-fit"),
    option(f"{CALIBRATED} --keep-inputs 0", r"option keep_inputs"),
    option(f"{CALIBRATED} --partition-rows 3", r"option partition_rows: .* found 3"),
    option(f"{CALIBRATED} --bos perhaps", r"--bos.*perhaps", None),
    option(f"{CALIBRATED} --nonesuch", r"--nonesuch", None),
    option(f"{CALIBRATED} --grace -1", r"'--grace': .*greater than or equal to 0", None),
    option(f"{CALIBRATED} --from-block 1", r"--from-block 1: .*new holds no run yet"),
    option("prune model", r"expected either MODEL and --output OUT, or --resume OUT"),
    option("prune model -o new --resume new", r"expected either MODEL and --output OUT, or --resume OUT"),
    option("prune --resume new --recipe x.yaml", r"--resume: takes no --recipe"),
    option("plan model --assume-device h1000", r"--assume-device h1000: unknown \(did you mean 'h100'\?\)"),
    option("plan model --bandwidth fast", r"--bandwidth fast: expected bytes per second, as 12GB/s"),
    option("plan model --assume-device h100 --device cpu", r"--device cpu contradicts --assume-device h100"),
    option("plan nobody/nothing", r"nobody/nothing: no such folder, and the Hugging Face hub", "bad-checkpoint"),
    option("eval model --text text.txt --windows 0", r"--windows 0: expected at least 1"),
    option("eval model --text text.txt --seqlen 1", r"--seqlen 1: expected at least 2 tokens"),
    option("eval model --text text.txt --workers 0", r"--workers 0, --threads 1: expected at least 1"),
    option("eval model --text text.txt --seqlen 64 --windows 999999", r"--text text\.txt: .* 999999 were", "bad-text"),
    option("eval model --text no.txt", r"no\.txt: no such file", "bad-text"),
    option("eval model", r"eval: expected --text FILE, --tasks NAME, or both"),
    option("eval no-such-model --text text.txt", r"no-such-model: no such folder", "bad-checkpoint"),
    option("allocate model -o shares.json", r"--allocation: say which, as erk"),
    option("allocate model -o text.txt --allocation erk", r"--output text\.txt: exists", "bad-output"),
    option(
        "allocate model -o no/shares.json --allocation erk", r"--output no/shares\.json: there is no fo", "bad-output"
    ),
    option("inspect no-such-model", r"no-such-model: no such folder", "bad-checkpoint"),
    option("inspect text.txt", r"text\.txt: ", "bad-checkpoint"),
    option("verify no-such-output", r"no-such-output: no billhook run in this folder", "no-run"),
    option("verify model", r"model: no billhook run in this folder", "no-run"),
    option("status model", r"model: no billhook run in this folder", "no-run"),
    option("status text.txt", r"text\.txt: no billhook run in this folder", "no-run"),
    option("prune --resume model", r"--resume model: holds no billhook run", "no-run"),
    option("methods wanda", r"wanda", None),
    option("nonesuch", r"nonesuch", None),
    pytest.param(
        option(f"{CALIBRATED} --device cuda", r"--device cuda: torch finds no CUDA device"),
        marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here"),
    ),
]


def recipe(name: str, content: str | bytes, message: str) -> Bad:
    """Return a row for a recipe file."""
    return Bad(f"recipe: {name}", "plan model --recipe r.yaml", "bad-option", message, file("r.yaml", content), "")


RECIPES = [
    Bad("recipe: missing", "plan model --recipe r.yaml", "bad-option", r"--recipe r\.yaml: cannot be read", needs=""),
    recipe("not YAML", "{", r"--recipe r\.yaml: cannot be read as YAML"),
    recipe("not UTF-8", b"\xff\xfe", r"--recipe r\.yaml: cannot be read as YAML"),
    recipe("code", "!!python/object/apply:os.system ['touch /tmp/x']", r"--recipe r\.yaml: cannot be read as YAML"),
    recipe("nested too deep", "[" * 9000, r"--recipe r\.yaml: cannot be read as YAML"),
    recipe("a list", "- method", r"--recipe r\.yaml: expected a mapping"),
    recipe("number as a key", "1: 2", r"--recipe r\.yaml: expected a mapping"),
    recipe("unknown key", "metod: wanda", r"'metod' is unknown \(did you mean 'method'\?\)"),
    recipe("word for a number", "samples: many", r"option samples: .*'many'"),
    recipe("list for a word", "method: [wanda]", r"option method: .*\['wanda'\]"),
]

ALLOCATION = f"{MAGNITUDE} --allocation a.json"
ALLOCATIONS = [
    Bad("allocation: not JSON", ALLOCATION, "bad-option", r"--allocation a\.json: ", file("a.json", "{"), ""),
    Bad("allocation: empty", ALLOCATION, "bad-option", r"--allocation a\.json: \S+: ", file("a.json", "{}"), ""),
    Bad("allocation: not UTF-8", ALLOCATION, "bad-option", r"--allocation a\.json: ", file("a.json", b"\xff"), ""),
]


def cut_off(path: Path) -> None:
    """Take the last line of a journal away: the run is then not finished."""
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))


def damage(path: Path) -> None:
    """Change a byte of a journal's first line."""
    data = path.read_bytes()
    path.write_bytes(data[:100] + bytes([data[100] ^ 1]) + data[101:])


def journal(change: Callable[[Path], None]) -> Callable[[Path], object]:
    return lambda place: change(place / "out" / "billhook" / "journal.jsonl")


PLAN = "--method magnitude --pattern 2:4 --exclude down_proj --workers 1"
RUNS = [
    Bad(
        "output: somebody else's",
        MAGNITUDE.replace("new", "notes"),
        "bad-output",
        r"-o \S*notes: the folder is not empty and holds no billhook run",
        lambda place: ((place / "notes").mkdir(), (place / "notes" / "thesis.txt").write_text("precious")),
        "",
    ),
    Bad("output: a file", MAGNITUDE.replace("new", "text.txt"), "bad-output", r"text\.txt: is a file", needs=""),
    Bad("output: the source", MAGNITUDE.replace("new", "model"), "bad-output", r"is the source model's folder"),
    Bad("output: in the source", MAGNITUDE.replace("new", "model/x"), "bad-output", r"source model's folder"),
    Bad("output: in a file", MAGNITUDE.replace("new", "text.txt/x"), "bad-output", r"cannot be written to", needs=""),
    Bad("output: not writable", MAGNITUDE.replace("new", "/proc/x"), "bad-output", r"/proc/x: cannot be wr", needs=""),
    Bad("output: unknown user", MAGNITUDE.replace("new", "~nosuchuser/x"), "bad-option", r"is no path", needs=""),
    Bad(
        "output: a loop of links",
        MAGNITUDE.replace("new", "loop"),
        "bad-option",
        r"loop: is no path",
        lambda place: (place / "loop").symlink_to("loop"),
        "",
    ),
    run("another plan", f"prune model -o out {PLAN} --include mlp", "other-plan", r"another plan; .*include"),
    run(
        "another source",
        f"prune model -o out {PLAN}",
        "other-plan",
        r"another source checkpoint, or it was changed since; checkpoint",
        lambda place: spoil.set_config(rms_norm_eps=0.5)(place / "model"),
    ),
    run(
        "a block too far",
        f"prune model -o out {PLAN} --from-block 9",
        "bad-option",
        r"--from-block 9: .*give at most 3",
    ),
    run("unfinished, verify", "verify out", "no-run", r"out: the run is not finished", journal(cut_off)),
    run("damaged journal, verify", "verify out", "damaged-run", r"journal\.jsonl: line 1 is damaged", journal(damage)),
    run("damaged journal, status", "status out", "damaged-run", r"journal\.jsonl: line 1 is damaged", journal(damage)),
    run("damaged journal, resume", "prune --resume out", "damaged-run", r"line 1 is damaged", journal(damage)),
    run("damaged journal, prune", f"prune model -o out {PLAN}", "damaged-run", r"line 1 is damaged", journal(damage)),
    run(
        "logits of no text",
        "verify out --logits",
        "bad-option",
        r"--logits: the run was calibrated on no text",
    ),
    run("text without logits", "verify out --text text.txt", "bad-option", r"--text: is for the prompts of --logits"),
    run("logits of a missing text", "verify out --logits --text no.txt", "bad-text", r"no\.txt: no such file"),
    run("against nothing", "verify out --against no-such-model", "bad-checkpoint", r"no-such-model: no such folder"),
    run("against a text", "verify out --against text.txt", "bad-checkpoint", r"text\.txt: is a file"),
    run(
        "inspect an unfinished one",
        "inspect out",
        "no-run",
        r"out: an unfinished run",
        lambda place: [
            path.rename(f"{path}.part") for path in [*(place / "out").glob("model-*"), place / "out" / spoil.INDEX]
        ],
    ),
]

ALL = [*MODELS, *TEXTS, *OPTIONS, *RECIPES, *ALLOCATIONS, *RUNS]


def tree(place: Path) -> dict[str, tuple[int, str]]:
    """Return every path below a folder, with what tells whether it was touched."""
    found = {}
    for path in sorted(place.rglob("*")):
        facts = path.lstat()
        content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        # A lock is taken to see whether anybody holds it.
        found[str(path.relative_to(place))] = (0 if path.name == "lock" else facts.st_mtime_ns, content)
    return found


@pytest.mark.parametrize("bad", ALL, ids=lambda bad: bad.name)
def test_bad_input(
    bad: Bad,
    llama: Path,
    text_file: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_bytes(text_file.read_bytes()[:100_000])
    if bad.needs:
        shutil.copytree(llama, tmp_path / "model")
    else:
        (tmp_path / "model").symlink_to(llama)
    if "O" in bad.needs:
        shutil.copytree(request.getfixturevalue("finished"), tmp_path / "out")
    bad.arrange(tmp_path)
    before = tree(tmp_path)
    monkeypatch.setattr(sys, "argv", ["billhook", *bad.command.split(), *(["--json"] if bad.code else [])])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out, err = capsys.readouterr()
    last = err.splitlines()[-1] if bad.code else err
    assert stop.value.code == 2, err
    assert re.search(bad.message, last), err
    assert "Traceback" not in err
    if bad.code is not None:
        assert json.loads(out)["error"]["code"] == bad.code
    assert tree(tmp_path) == before


@pytest.fixture
def model_copy(llama: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(llama, tmp_path / "model"))


def test_a_second_driver_on_the_same_output_is_refused(llama: Path, tmp_path: Path) -> None:
    from billhook.orchestrator.output import locked

    with locked(tmp_path / "out"), pytest.raises(InputError, match="another billhook is writing to it"):
        prune(llama, tmp_path / "out", method="magnitude")


def test_remote_code_is_run_on_request_only(model_copy: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    (model_copy / "configuration_evil.py").write_text(
        f"open({str(marker)!r}, 'w').close()\nfrom transformers import LlamaConfig\n"
        "class Evil(LlamaConfig):\n    pass\n"
    )
    spoil.edit_json(
        model_copy / "config.json",
        lambda c: c.update(model_type="evil", auto_map={"AutoConfig": "configuration_evil.Evil"}),
    )
    with pytest.raises(InputError, match="--trust-remote-code"):
        prune(model_copy, tmp_path / "out", method="magnitude")
    assert not marker.exists()


def test_a_link_as_output_is_emptied_again(model_copy: Path, tmp_path: Path, ray_cluster: None) -> None:
    for path in spoil.shards(model_copy):
        tensors = load_file(path)
        for name in tensors:
            if "layers.0." in name:
                tensors[name].fill_(float("nan"))
        save_file(tensors, path, metadata={"format": "pt"})
    real, link = tmp_path / "real", tmp_path / "link"
    real.mkdir()
    link.symlink_to(real)
    with pytest.raises(InputError, match="holds NaN"):
        prune(model_copy, link, method="magnitude", workers=1)
    assert list(real.iterdir()) == []
