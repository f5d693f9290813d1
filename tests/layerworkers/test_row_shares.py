"""How rows share what a linear loses."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from billhook.layerworkers.row_shares import row_counts


@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 300), st.floats(0, 1), st.floats(0, 0.5))
def test_counts_add_up_fall_with_the_scores_and_leave_rows_within_bounds(
    seed: int, rows: int, columns: int, share: float, spread: float
) -> None:
    score = np.random.default_rng(seed).normal(size=rows).astype(np.float32).round(1)
    removed = int(share * rows * columns)
    counts = row_counts(score, columns, removed, spread)
    assert counts.sum() == removed
    by_score = counts[np.argsort(-score, kind="stable")]
    assert (np.diff(by_score) >= -1).all(), "of equal scores, the first may lose one more"
    least, most = min(0.01 * columns, removed // rows), max(0.99 * columns, -(-removed // rows))
    assert least <= counts.min()
    assert counts.max() <= most
    for level in np.unique(score):
        assert np.ptp(counts[score == level]) <= 1


def test_shares_are_spread_by_the_scores() -> None:
    score = np.array([3.0, -1.0, 0.0, 2.0], dtype=np.float32)
    # d = 0.2 (a + 1) / 4: 0.2, 0, 0.05, 0.15, and their mean is 0.1
    assert row_counts(score, 1000, 2400, 0.1).tolist() == [500, 700, 650, 550]
    assert row_counts(score, 1000, 2400, 0.0).tolist() == [600] * 4
    assert row_counts(np.zeros(4), 1000, 2402, 0.1).tolist() == [601, 601, 600, 600]


@pytest.mark.parametrize(("removed", "expected"), [(2800, [10, 990, 900, 900]), (3980, [995] * 4), (4, [1] * 4)])
def test_what_a_row_at_its_bound_cannot_take_the_others_share(removed: int, expected: list[int]) -> None:
    score = np.array([9.0, 0.0, 1.0, 1.0], dtype=np.float32)
    assert row_counts(score, 1000, removed, 0.9).tolist() == expected
