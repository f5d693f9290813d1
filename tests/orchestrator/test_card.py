"""The model card: what was done, how it came out, and under which terms."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from billhook.layerworkers.tasks import LinearReport
from billhook.orchestrator.card import carried_over, model_card
from billhook.orchestrator.recipe import Recipe
from billhook.orchestrator.request import Request, make_request

TERMS = {
    "license": "other",
    "license_name": "acorn-2",
    "license_link": "LICENSE",
    "base_model": "acorn/sprout",
    "language": ["en", "cy"],
}


@pytest.fixture
def source(llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "source"))


def terms(source: Path, **metadata: Any) -> None:
    (source / "README.md").write_text(f"---\n{yaml.safe_dump(metadata)}---\n# A sprout\n")


def reports(request: Request) -> list[LinearReport]:
    """As if the largest error were the last block's, and a damping had been raised there."""
    return [
        LinearReport(
            linear.disk_name, linear.shape, "unstructured", "sparsegpt", 100 * block, 100 * block, 0.01 * block,
            (0.01, 0.1) if block == 2 and linear.name.endswith("q_proj") else (0.01,),
        )
        for block, linears in enumerate(request.linears)
        for linear in linears
    ]  # fmt: skip


def card_of(source: Path, **options: Any) -> tuple[dict[str, Any], str]:
    request = make_request(source, Recipe(method="sparsegpt", calibration="text.txt", **options))
    _, head, body = model_card(request, reports(request), "f00d").split("---\n", 2)
    return yaml.safe_load(head), body


def test_recipe_and_figures_are_told(source: Path) -> None:
    head, body = card_of(source, samples=8, seqlen=64, exclude=("up_proj", "down`?_proj"))
    assert head["tags"] == ["billhook", "pruned"]
    assert "license" not in head
    assert "- method: `sparsegpt`" in body
    assert "- excluded: `up_proj, down'?_proj`" in body
    assert "- fitted to: `lockstep`" in body
    assert "- damping raised for 1 linears" in body
    assert "8 samples of 64 tokens, seed 0, tokens sha256 `f00d`" in body
    rows = [line for line in body.splitlines() if line.startswith("| `")]
    assert len(rows) == 5
    elements = 3 * 64 * 64
    assert f"| `self_attn.q_proj` | 3 | {300 / elements:.4f} | 0.01 | 0.02 |" in rows
    assert str(source) not in body


def test_terms_of_the_source_hold(source: Path) -> None:
    terms(source, **TERMS, tags=["theirs"], datasets=["their/data"])
    (source / "LICENSE").write_text("Plant it.")
    (source / "NOTICE.txt").write_text("An oak.")
    head, body = card_of(source)
    assert {key: head[key] for key in TERMS} == TERMS
    assert head["tags"] == ["billhook", "pruned"]
    assert "datasets" not in head
    assert "names `acorn-2`; whatever holds for the original holds for this model." in body
    assert "Its `LICENSE`, `NOTICE.txt` lies beside this file." in body


def test_what_is_no_text_is_not_carried_over(source: Path) -> None:
    terms(source, license={"a": 1}, language=["en", 3], base_model=["a/b", "c/d"], license_name="")
    assert carried_over(source) == {"base_model": ["a/b", "c/d"]}
    for damaged in (b"---\nlicense: [\n---\n", b"\xff\xfe", b"---\n- 1\n---\n", b"no head"):
        (source / "README.md").write_bytes(damaged)
        assert carried_over(source) == {}
        assert "names no licence" in card_of(source)[1]


def test_a_hostile_licence_stays_text(source: Path) -> None:
    terms(source, license="mit\n---\n# owned", language="en: [", license_name="`# owned` | <b>")
    head, body = card_of(source)
    assert "license" not in head
    assert head["language"] == "en: ["
    assert head["license_name"] == "`# owned` | <b>"
    assert "names `'# owned' / <b>`; " in body
