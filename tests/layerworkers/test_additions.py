"""To what a linear's output is added, in blocks that make it hard to tell."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from billhook.layerworkers.additions import Additions


class Block(nn.Module):
    """A residual stream with two linears, whose norms may be one."""

    def __init__(self, shared_norm: bool):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(8), nn.Linear(8, 8)
        self.norm_after = self.norm if shared_norm else nn.LayerNorm(8)
        self.mlp = nn.Linear(8, 8)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.attention(self.norm(hidden))
        return hidden + self.mlp(self.norm_after(hidden))


class Scaled(Block):
    """What the first linear makes is scaled before it is added."""

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + 0.5 * self.attention(self.norm(hidden))
        return hidden + self.mlp(self.norm_after(hidden))


class Reused(Block):
    """The first norm also sees what is no residual stream."""

    def forward(self, hidden: Tensor) -> Tensor:
        self.norm(torch.zeros_like(hidden))
        return super().forward(hidden)


def residuals(block: nn.Module) -> dict[str, str]:
    with torch.inference_mode(), Additions(block, ["attention", "mlp"]) as additions:
        block(torch.randn(1, 3, 8))
    return additions.residuals()


@pytest.mark.parametrize(
    ("block", "found"),
    [
        (Block(shared_norm=False), {"attention": "norm", "mlp": "norm_after"}),
        (Scaled(shared_norm=False), {"mlp": "norm_after"}),
        (Block(shared_norm=True), {}),
        (Reused(shared_norm=False), {"mlp": "norm_after"}),
    ],
    ids=["plain", "scaled", "one norm for both", "a norm that sees more"],
)
def test_a_residual_is_named_only_where_its_module_sees_nothing_else(block: Block, found: dict[str, str]) -> None:
    assert residuals(block) == found
