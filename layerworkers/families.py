"""What the classes of transformers do not say of themselves: one row for each that needs help."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

ROUTERS = frozenset({"router", "gate", "shared_expert_gate"})
"""Names of modules beside experts that choose or weigh these: their linears are never pruned."""


@dataclass(frozen=True)
class Stacked:
    """How a module holds its experts: parameters ``gate_up_proj`` (``up_proj`` without gate) and ``down_proj``."""

    has_gate: bool
    is_transposed: bool
    """Whether each expert's weights are [inputs, outputs]."""
    has_bias: bool
    by_expert: bool = False
    """Whether it is called with one input for each expert, [E * N, H], in which rows that are not sent there are 0."""


STACKED = {"Llama4TextExperts": Stacked(has_gate=True, is_transposed=True, has_bias=False, by_expert=True)}
"""By class; all others declare it themselves, for ``transformers.integrations.moe``."""


def stacked_experts(module: Any) -> Stacked | None:
    """Return how a module holds experts; None where it holds none."""
    if (row := STACKED.get(type(module).__name__)) is not None:
        return row
    if not all(hasattr(module, name) for name in ("has_gate", "is_transposed", "has_bias", "down_proj")):
        return None
    return Stacked(module.has_gate, module.is_transposed, module.has_bias)
