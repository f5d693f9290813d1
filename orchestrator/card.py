"""The model card of a pruned checkpoint."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from billhook.layerworkers.tasks import LinearReport
from billhook.orchestrator.history import Decided
from billhook.orchestrator.recipe import Recipe
from billhook.orchestrator.request import Request

CARRIED = ("license", "license_name", "license_link", "base_model", "language")
"""Keys of the source's card that hold for what is made of it, too."""

_BODY = """
# A model pruned to {sparsity:.1%} sparsity

Pruned by billhook with `{method}`, pattern `{pattern}`: {zeros:,} of the
{elements:,} weights of {linears} linears are zero. Names, dtypes, shards and config are those of the original, so it
loads wherever the original loads, with the same size and speed: zeros save memory or time only in a runtime that
makes use of them.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("PATH", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("PATH")
```

## Recipe

{recipe}

Calibration: {calibration}

## Figures

The error is each linear's own, as its method measures it, relative to what it was.

{figures}

## Licence

{licence}
"""

_STATISTICS = """# Collected statistics

What the inputs of {linears} linears of a model are like, written by `billhook collect`: of each input the Gram matrix
over all tokens, and its moments, in float32. `billhook solve` makes sparse checkpoints of it, without running a sample.

Samples, passed through the dense model in `{dtype}`: {samples}

Each block has a file, and in it each input a flat tensor, named after the first of its linears: the lower triangle of
the Gram matrix row after row; then of each channel the sum of squares, the sum, the number of tokens, that of samples.
"""


def model_card(
    request: Request, reports: Sequence[LinearReport], calibration_sha256: str | None, earlier: Sequence[Decided] = ()
) -> str:
    """Return the text of the card; the same for the same plan, so nothing timed is in it.

    earlier: by what the first blocks were pruned, where that is not ``request``.
    """
    recipe, checkpoint = request.recipe, request.model.checkpoint
    zeros, elements = _counts(reports)
    lines = [f"- {key}: `{value}`" for key, value in [("method", recipe.method), ("pattern", request.pattern)]]
    lines += [f"- {key}: `{value}`" for key, value in request.options.items()]
    lines += [f"- method of {_code(regex)}: `{method}`" for regex, method in recipe.methods.items()]
    if request.allocation is not None:
        each = "row, linear" if request.allocation.by_row else "linear"
        lines.append(f"- allocation: `{request.allocation.name}`, one sparsity for each {each} or block")
    lines += [f"- sparsity: `{recipe.sparsity}`", f"- compute dtype: `{recipe.dtype}`"]
    if request.samples:
        lines.append(f"- fitted to: `{recipe.fit}`")
    lines += [
        f"- {key}d: {_code(', '.join(found))}" for key in ("include", "exclude") if (found := getattr(recipe, key))
    ]
    lines += [
        f"- from block {each.first_block} on it was at first: "
        + ", ".join(f"{key} `{each.fingerprint['recipe'][key]}`" for key in ("method", "pattern", "sparsity"))
        for each in earlier
    ]
    if request.collected is not None:
        calibration = request.collected.calibration
    else:
        calibration = "none" if calibration_sha256 is None else _samples(recipe, calibration_sha256)
    lines += [
        f"- {count} linears of experts that few calibration tokens were sent to: `{fallback}`"
        for fallback, count in sorted(Counter(report.fallback for report in reports if report.fallback).items())
    ]
    if raised := sum(len(report.dampings) > 1 for report in reports):
        lines.append(f"- damping raised for {raised} linears")
    kinds = {linear.disk_name: linear.kind for linears in request.linears for linear in linears}
    carried = carried_over(checkpoint.folder)
    body = _BODY.format(
        sparsity=zeros / elements if elements else 0.0,
        method=recipe.method,
        pattern=request.pattern,
        zeros=zeros,
        elements=elements,
        linears=len(reports),
        recipe="\n".join(lines),
        calibration=calibration,
        figures="\n".join(_figures(reports, kinds)),
        licence=_licence(carried, checkpoint.others),
    )
    data = ModelCardData(library_name="transformers", pipeline_tag="text-generation", tags=["billhook", "pruned"])
    for key, value in carried.items():
        setattr(data, key, value)
    return f"---\n{data.to_yaml()}\n---\n{body}"


def statistics_card(request: Request, calibration_sha256: str | None) -> str:
    """Return what says what a folder of collected statistics is."""
    assert calibration_sha256 is not None
    return _STATISTICS.format(
        linears=sum(map(len, request.linears)),
        samples=_samples(request.recipe, calibration_sha256),
        dtype=request.recipe.dtype,
    )


def _samples(recipe: Recipe, sha256: str) -> str:
    return f"{recipe.samples} samples of {recipe.seqlen} tokens, seed {recipe.seed}, tokens sha256 `{sha256}`"


def carried_over(folder: Path) -> dict[str, Any]:
    """Return what the card of a source says that holds for the pruned model: texts, or lists of texts."""
    card = folder / "README.md"
    if not card.is_file():
        return {}
    try:
        data = ModelCard.load(card, ignore_metadata_errors=True).data
    except (ValueError, OSError, yaml.YAMLError):
        return {}
    found = {key: data.get(key) for key in CARRIED}
    return {key: value for key, value in found.items() if _is_text(value) or _is_texts(value)}


def _figures(reports: Sequence[LinearReport], kinds: dict[str, str]) -> Iterator[str]:
    """Yield a table: the linears of each kind in a row."""
    by_kind: defaultdict[str, list[LinearReport]] = defaultdict(list)
    for report in reports:
        by_kind[kinds.get(report.name, report.name)].append(report)
    yield "| linears | number | sparsity | median error | largest error |"
    yield "|---|---|---|---|---|"
    for kind, some in by_kind.items():
        zeros, elements = _counts(some)
        errors = [report.error for report in some]
        yield (
            f"| {_code(kind)} | {len(some)} | {zeros / elements:.4f} | {statistics.median(errors):.3g} "
            f"| {max(errors):.3g} |"
        )


def _licence(carried: dict[str, Any], others: Sequence[str]) -> str:
    files = [name for name in others if name.upper().startswith(("LICENSE", "LICENCE", "NOTICE", "USE_POLICY"))]
    beside = f" Its {', '.join(_code(name) for name in files)} lies beside this file." if files else ""
    said = carried.get("license_name") or carried.get("license")
    if said is None:
        told = "The original's card names no licence"
    else:
        told = f"The original's card names {_code(said if isinstance(said, str) else ', '.join(said))}"
    return f"{told}; whatever holds for the original holds for this model.{beside}"


def _counts(reports: Sequence[LinearReport]) -> tuple[int, int]:
    """Return zeros and elements."""
    return sum(report.zeros for report in reports), sum(report.shape[0] * report.shape[1] for report in reports)


def _code(text: str) -> str:
    """Return a text as Markdown shows it as it is, in a table too."""
    plain = " ".join(text.replace("`", "'").replace("|", "/").split())
    return f"`{plain}`"


def _is_text(value: object) -> bool:
    """Whether it is one line: more could end the head of the card, and say what its source does not."""
    return isinstance(value, str) and bool(value) and value.isprintable()


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(_is_text(each) for each in value)
