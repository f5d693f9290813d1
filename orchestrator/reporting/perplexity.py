"""What a report tells of evaluations: perplexity dense against pruned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from billhook.orchestrator.command import as_line
from billhook.orchestrator.recorded import Pair, Perplexity, Recorded, pairs, subject_of
from billhook.orchestrator.reporting.record import RunRecord


def compared(record: RunRecord, recorded: Sequence[Recorded]) -> list[Pair]:
    """Return the evaluations of the run's source and of its output that can be compared."""
    return list(pairs(recorded, record.output, record.decided[-1]))


def perplexity_section(record: RunRecord, recorded: Sequence[Recorded]) -> dict[str, Any]:
    """Return what the page tells of evaluations, and how to come by them where there are none."""
    return {
        "evaluations": [
            {
                **each.model_dump(),
                "subject": subject_of(each.checkpoint, record.output, record.decided[-1]),
                "perplexity": as_text(each.perplexity),
            }
            for each in recorded
        ],
        "pairs": [
            {"dense": as_text(pair.dense), "pruned": as_text(pair.pruned.perplexity), "told": _told(pair)}
            for pair in compared(record, recorded)
        ],
        "evaluate": _commands(record),
    }


def as_text(perplexity: Perplexity) -> str:
    """Return a perplexity as text."""
    return "infinite" if perplexity is None else f"{perplexity:.4g}"


def _told(pair: Pair) -> str:
    pruned, told = pair.pruned, ""
    if pair.dense is not None and pruned.perplexity is not None:
        told = f": {pruned.perplexity / pair.dense:.3g} times as large"
    told += f", on {pruned.windows} windows of {pruned.seqlen} tokens of {pruned.text}"
    if pair.distance is not None:
        divergence = (
            "infinite" if pair.distance.divergence is None else f"{pair.distance.divergence:.4g} nats per token"
        )
        told += f"; KL divergence {divergence}, the same likeliest token for {pair.distance.agreement:.1%} of them"
    return told


def _commands(record: RunRecord) -> str:
    output = str(record.output)
    evaluation = ["billhook", "eval", output, "--against", record.decided[-1].source, "--text", "FILE", "--json"]
    return f"{as_line(evaluation)} > quality.json\n" + as_line(
        ["billhook", "report", output, "--evaluation", "quality.json"]
    )
