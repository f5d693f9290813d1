"""The model card of a pruned checkpoint."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import yaml
from huggingface_hub import ModelCard, ModelCardData

from billhook.layerworkers.tasks import LinearReport
from billhook.orchestrator.history import Decided
from billhook.orchestrator.request import Request

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
"""


def model_card(
    request: Request, reports: Sequence[LinearReport], calibration_sha256: str | None, earlier: Sequence[Decided] = ()
) -> str:
    """Return the text of the card; the same for the same plan, so nothing timed is in it.

    earlier: by what the first blocks were pruned, where that is not ``request``.
    """
    recipe = request.recipe
    zeros, elements = (
        sum(report.zeros for report in reports),
        sum(report.shape[0] * report.shape[1] for report in reports),
    )
    lines = [f"- {key}: `{value}`" for key, value in [("method", recipe.method), ("pattern", request.pattern)]]
    lines += [f"- {key}: `{value}`" for key, value in request.options.items()]
    if request.allocation is not None:
        lines.append(f"- allocation: `{request.allocation.name}`, one sparsity for each linear or block")
    lines += [f"- sparsity: `{recipe.sparsity}`", f"- compute dtype: `{recipe.dtype}`"]
    lines += [
        f"- from block {each.first_block} on it was at first: "
        + ", ".join(f"{key} `{each.fingerprint['recipe'][key]}`" for key in ("method", "pattern", "sparsity"))
        for each in earlier
    ]
    calibration = (
        "none"
        if calibration_sha256 is None
        else f"{recipe.samples} samples of {recipe.seqlen} tokens, seed {recipe.seed}, "
        f"tokens sha256 `{calibration_sha256}`"
    )
    lines += [
        f"- {count} linears of experts that few calibration tokens were sent to: `{fallback}`"
        for fallback, count in sorted(Counter(report.fallback for report in reports if report.fallback).items())
    ]
    body = _BODY.format(
        sparsity=zeros / elements if elements else 0.0,
        method=recipe.method,
        pattern=request.pattern,
        zeros=zeros,
        elements=elements,
        linears=len(reports),
        recipe="\n".join(lines),
        calibration=calibration,
    )
    data = ModelCardData(library_name="transformers", pipeline_tag="text-generation", tags=["billhook", "pruned"])
    data.license = _source_license(request.model.checkpoint.folder)
    return f"---\n{data.to_yaml()}\n---\n{body}"


def _source_license(folder: Path) -> str | None:
    card = folder / "README.md"
    if not card.is_file():
        return None
    try:
        license_name = ModelCard.load(card, ignore_metadata_errors=True).data.get("license")
    except (ValueError, OSError, yaml.YAMLError):
        return None
    return license_name if isinstance(license_name, str) else None
