"""Whole runs through Ray on a tiny Llama: what users rely on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from billhook.layerworkers.collective import Alone
from billhook.layerworkers.stopwatch import PARTS
from billhook.layerworkers.tasks import Sample
from billhook.layerworkers.worker import BlockWorker
from billhook.orchestrator import InputError, PruneResult, evaluate, inspect, plan, prune, verify
from billhook.orchestrator.journal import read_journal
from billhook.orchestrator.model import open_model
from billhook.orchestrator.planning import estimate

pytestmark = pytest.mark.usefixtures("ray_cluster")

CALIBRATION: dict[str, Any] = {"samples": 18, "seqlen": 32, "partition_rows": 32}
"""Five partitions of four samples, the last one short; several row partitions in every linear."""


def contents(output: Path) -> dict[str, bytes]:
    """Everything that must not depend on how a run went."""
    files = {path.name: path.read_bytes() for path in output.iterdir() if path.is_file()}
    return {**files, "manifest": (output / "billhook" / "manifest.json").read_bytes()}


@pytest.fixture(scope="module")
def whole(llama: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> PruneResult:
    """What one worker makes of it with the default method: treat as read-only."""
    return prune(llama, tmp_path_factory.mktemp("whole") / "out", calibration=str(text_file), workers=1, **CALIBRATION)


@pytest.mark.parametrize(
    ("method", "pattern"), [("sparsegpt", "2:4"), pytest.param("admm", "unstructured", marks=pytest.mark.thorough)]
)
def test_the_bytes_that_each_block_moves_are_those_planned(
    llama: Path, text_file: Path, tmp_path: Path, method: str, pattern: str
) -> None:
    options: dict[str, Any] = {"method": method, "pattern": pattern, "calibration": str(text_file), "workers": 3}
    made = plan(llama, **options, **CALIBRATION)
    output = prune(llama, tmp_path / "out", **options, **CALIBRATION).output
    events = [json.loads(line) for line in (output / "billhook" / "events.jsonl").read_text().splitlines()]
    blocks = [event for event in events if event["event"] == "block"]
    for block in blocks:
        assert set(block["parts_seconds"]) == set(PARTS)
        assert sum(block["parts_seconds"].values()) == pytest.approx(block["seconds"], rel=0.02)
    measured = [block["moved_bytes"] for block in blocks]
    planned = [time.moved_bytes for time in made.times]
    assert measured == pytest.approx(planned, rel=0.05)
    assert sum(planned) == estimate(made).moved_bytes > 0


TIERS: list[dict[str, Any]] = [
    {"activations": "disk", "intermediates": "spill", "statistics": "disk"},
    {"activations": "ram", "intermediates": "replay", "statistics": "ram"},
]


@pytest.mark.parametrize(
    ("method", "fit"), [("auto", "lockstep"), pytest.param("admm", "dense-block", marks=pytest.mark.thorough)]
)
def test_where_things_are_kept_changes_no_byte(
    llama: Path, text_file: Path, tmp_path: Path, whole: PruneResult, method: str, fit: Any
) -> None:
    options: dict[str, Any] = {"method": method, "fit": fit, "calibration": str(text_file), **CALIBRATION}
    is_default = (method, fit) == ("auto", "lockstep")
    held = whole if is_default else prune(llama, tmp_path / "held", workers=1, **options)
    reference = contents(held.output)
    for number, tiers in enumerate(TIERS):
        kept = {**tiers, "intermediates": "replay"} if fit == "dense-block" else tiers
        result = prune(llama, tmp_path / str(number), workers=2, scratch=str(tmp_path / "scratch"), **kept, **options)
        assert contents(result.output) == reference
    assert not list((tmp_path / "scratch").iterdir())


def test_a_budget_that_is_too_small_is_refused_before_anything_is_written(
    llama: Path, text_file: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"calibration": str(text_file), **CALIBRATION}
    with pytest.raises(InputError, match=r"--ram 100MiB: too small .* works is --ram \d+MiB"):
        prune(llama, tmp_path / "out", ram="100MiB", **options)
    with pytest.raises(InputError, match=r"--disk: the output needs \d+MiB, and 1MiB may be used on its disk"):
        prune(llama, tmp_path / "out", disk="1KiB", **options)
    with pytest.raises(InputError, match="--vram"):
        prune(llama, tmp_path / "out", vram="1KiB", **options)
    assert not (tmp_path / "out").exists()


def test_planned_and_measured_disk_agree(whole: PruneResult) -> None:
    assert whole.peak_bytes["disk"] <= 1.05 * whole.planned_bytes["disk"]


def test_the_output_loads_in_transformers_and_computes_what_we_compute(whole: PruneResult, text_file: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = whole.output
    assert verify(out).ok
    model = AutoModelForCausalLM.from_pretrained(out)
    assert isinstance(AutoTokenizer.from_pretrained(out)("text").input_ids, list)
    weight = model.model.layers[1].mlp.down_proj.weight
    assert (weight == 0).float().mean() == pytest.approx(0.5, abs=1e-3)
    ours = evaluate(out, text_file, seqlen=64, windows=6, workers=2)
    assert (ours.windows, ours.tokens) == (6, 6 * 63)
    tokens = AutoTokenizer.from_pretrained(out)(text_file.read_text(), add_special_tokens=False).input_ids
    opened = open_model(out, "cpu", "auto", False)
    worker = BlockWorker(opened.worker_setup(torch.get_num_threads()), Alone())
    windows = torch.tensor(tokens[: 6 * 64]).view(6, 1, 64)
    worker.start(opened.layout.stem, [Sample(i, tuple(window[0].tolist())) for i, window in enumerate(windows)])
    for block in opened.layout.blocks:
        worker.forward_block(block.index, block.tensors)
    losses = []
    for number, window in enumerate(windows):
        with torch.inference_mode():
            theirs = model(window, labels=window)
        assert torch.equal(worker.logits(number), theirs.logits)
        losses.append(float(theirs.loss))
    assert ours.perplexity == pytest.approx(float(torch.tensor(losses).mean().exp()), rel=1e-4)
    assert evaluate(out, text_file, seqlen=64, windows=6, workers=1).perplexity == ours.perplexity


def test_names_dtypes_shards_and_what_is_not_pruned_are_the_sources(
    llama: Path, text_file: Path, tmp_path: Path
) -> None:
    out = prune(
        llama, tmp_path / "out", method="wanda", exclude=("down_proj",), calibration=str(text_file), workers=1,
        **CALIBRATION,
    ).output  # fmt: skip
    source_files = {path.name for path in llama.iterdir()}
    assert {path.name for path in out.iterdir()} == source_files | {"README.md", "billhook"}
    assert (out / "billhook").stat().st_mode & 0o777 == 0o700
    changed = set()
    for shard in llama.glob("*.safetensors"):
        with safe_open(shard, "pt") as old, safe_open(out / shard.name, "pt") as new:
            assert old.keys() == new.keys()
            for name in old.keys():  # noqa: SIM118 - a safetensors file is no dict
                before, after = old.get_tensor(name), new.get_tensor(name)
                assert (before.dtype, before.shape) == (after.dtype, after.shape)
                if not torch.equal(before, after):
                    changed.add(name.rpartition("layers.")[2].split(".", 1)[1].removesuffix(".weight"))
    kinds = {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert changed == {f"self_attn.{kind}" for kind in kinds} | {"mlp.gate_proj", "mlp.up_proj"}
    for name in source_files - {path.name for path in llama.glob("*.safetensors")}:
        assert (out / name).read_bytes() == (llama / name).read_bytes()
    facts = {fact.name: fact.pattern for fact in inspect(out).tensors}
    assert facts["model.layers.0.self_attn.q_proj.weight"] == "unstructured"
    assert facts["model.layers.0.mlp.down_proj.weight"] == "dense"


def test_random_calibration_needs_no_tokenizer_and_tied_single_file_checkpoints_work(
    make_model: Any, tmp_path: Path
) -> None:
    folder = make_model(shard_size="10MB", tie_word_embeddings=True, dtype=torch.float16)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    result = prune(folder, tmp_path / "out", pattern="4:8", calibration="random", workers=1, **CALIBRATION)
    assert result.sparsity == 0.5
    assert verify(result.output).ok
    assert {fact.pattern for fact in inspect(result.output / "model.safetensors").tensors if len(fact.shape) == 2} == {
        "4:8",
        "dense",
    }


def with_bad_weight(source: Path, folder: Path, name: str, value: float) -> Path:
    shutil.copytree(source, folder)
    for shard in folder.glob("*.safetensors"):
        tensors = load_file(shard)
        if name in tensors:
            tensors[name].view(-1)[3] = value
            save_file(tensors, shard, metadata={"format": "pt"})
    return folder


def test_nan_in_the_first_block_leaves_no_output(llama: Path, text_file: Path, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    folder = with_bad_weight(llama, tmp_path / "bad", name, float("nan"))
    with pytest.raises(InputError, match=rf"{name} holds NaN or infinity"):
        prune(folder, tmp_path / "out", calibration=str(text_file), workers=2, **CALIBRATION)
    assert not (tmp_path / "out").exists()


def test_nan_in_a_later_block_leaves_a_resumable_output(llama: Path, text_file: Path, tmp_path: Path) -> None:
    folder = with_bad_weight(llama, tmp_path / "bad", "model.layers.2.input_layernorm.weight", float("nan"))
    options: dict[str, Any] = {"calibration": str(text_file), "workers": 1, **CALIBRATION}
    with pytest.raises(InputError, match=r"model\.layers\.2\.input_layernorm\.weight"):
        prune(folder, tmp_path / "out", **options)
    assert [line["kind"] for line in read_journal(tmp_path / "out")] == ["plan", "start", "block", "block", "error"]
    with pytest.raises(InputError, match="not finished"):
        verify(tmp_path / "out")
    with pytest.raises(InputError, match="unfinished run"):
        inspect(tmp_path / "out")


def test_the_manifest_tells_how_each_linear_came_out(llama: Path, text_file: Path, tmp_path: Path) -> None:
    out = prune(
        llama, tmp_path / "out", method="sparsegpt", options={"damping": 0.05}, calibration=str(text_file), workers=1,
        **CALIBRATION,
    ).output  # fmt: skip
    manifest = json.loads((out / "billhook" / "manifest.json").read_text())
    assert manifest["recipe"]["options"] == {"damping": 0.05, "block": 128}
    assert len(manifest["linears"]) == 21
    for linear in manifest["linears"]:
        rows, columns = linear["shape"]
        blocks = [min(128, columns - start) for start in range(0, columns, 128)]
        assert linear["removed"] == linear["zeros"] == sum(rows * width // 2 for width in blocks)
        assert 0 < linear["error"] < 1
        assert linear["dampings"] == [0.05]


def test_wanda_fitted_to_the_dense_block_is_the_published_procedure(
    llama: Path, text_file: Path, tmp_path: Path
) -> None:
    """Block after block: norms of all linears' inputs with the dense weights, then prune, then forward again."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = prune(
        llama, tmp_path / "out", method="wanda", pattern="2:4", calibration=str(text_file), workers=2, **CALIBRATION
    ).output
    model = AutoModelForCausalLM.from_pretrained(llama)
    text = text_file.read_text()
    tokens = AutoTokenizer.from_pretrained(llama)(text, add_special_tokens=False, verbose=False).input_ids
    starts = torch.randint(0, len(tokens) - 33, (18,), generator=torch.Generator().manual_seed(0)).tolist()
    batch = torch.tensor([tokens[start : start + 32] for start in starts])
    for block in model.model.layers:
        squares: dict[str, torch.Tensor] = {}
        linears = {name: each for name, each in block.named_modules() if isinstance(each, torch.nn.Linear)}

        def note(_: Any, inputs: Any, name: str, squares: dict[str, torch.Tensor] = squares) -> None:
            squares[name] = squares.get(name, 0) + inputs[0].float().square().flatten(0, 1).sum(0)

        handles = [
            each.register_forward_pre_hook(lambda m, x, name=name, note=note: note(m, x, name))
            for name, each in linears.items()
        ]
        with torch.inference_mode():
            for sample in batch:
                model(sample[None])
        for handle in handles:
            handle.remove()
        for name, each in linears.items():
            score = (each.weight.detach().float().abs() * squares[name].sqrt()).view(-1, 4)
            prune_mask = torch.zeros_like(score, dtype=torch.bool)
            prune_mask.scatter_(1, score.sort(dim=1, stable=True).indices[:, :2], True)
            each.weight.data.masked_fill_(prune_mask.view_as(each.weight), 0.0)
    ours = AutoModelForCausalLM.from_pretrained(out).state_dict()
    for name, weight in model.state_dict().items():
        differing = float((ours[name] != weight).float().mean())
        assert differing < 0.002, f"{name}: {differing:.4f} of the entries differ"  # sums in another order: near ties
