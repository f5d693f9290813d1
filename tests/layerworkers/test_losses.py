"""Losses and divergences of a window, against the formulas in float64."""

from __future__ import annotations

import pytest
import torch

from billhook.layerworkers.errors import RunError
from billhook.layerworkers.losses import window_comparison, window_loss
from billhook.layerworkers.tasks import Sample

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_comparisons_are_the_formula(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = (3 * torch.randn(300, 50, generator=generator).to(dtype) for _ in range(2))
    tokens = torch.randint(0, 50, (300,), generator=generator)
    sample = Sample(7, tuple(tokens.tolist()))
    found = window_comparison(p, q, sample, CPU)
    log_p, log_q = (each[:-1].double().log_softmax(-1) for each in (p, q))
    assert found.divergence_nats == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()), rel=1e-6)
    assert found.agreeing == int((p[:-1].argmax(-1) == q[:-1].argmax(-1)).sum())
    assert found.reference_nats == pytest.approx(float(-log_p.gather(1, tokens[1:, None]).mean()), rel=1e-6)
    assert found.loss == window_loss(q, sample, CPU)
    assert found.loss.nats == pytest.approx(float(-log_q.gather(1, tokens[1:, None]).mean()), rel=1e-6)
    assert (found.loss.index, found.loss.targets) == (7, 299)


def test_a_model_is_as_far_from_itself_as_nothing() -> None:
    logits = torch.randn(9, 20, generator=torch.Generator().manual_seed(1))
    found = window_comparison(logits, logits + 5, Sample(0, tuple(range(9))), CPU)
    assert found.divergence_nats == pytest.approx(0, abs=1e-6)
    assert found.agreeing == found.loss.targets == 8


def test_what_is_not_finite_is_named() -> None:
    good, bad = torch.zeros(4, 5), torch.full((4, 5), torch.inf)
    for pair in ((good, bad), (bad, good)):
        with pytest.raises(RunError, match="window 3"):
            window_comparison(*pair, Sample(3, (0, 1, 2, 3)), CPU)
