import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from billhook.kernels.select import (
    KEY_LEVELS,
    below_with_ties,
    bin_of,
    histogram,
    smallest_by_row,
    smallest_in_groups,
    smallest_in_rows,
    smallest_reference,
    sortable_keys,
    zero_where_,
)


def by_histograms(score: torch.Tensor, count: int) -> torch.Tensor:
    """The selection as it is done over several workers, on one."""
    known = prefix = 0
    for bits in KEY_LEVELS:
        bin_index, before = bin_of(histogram(score, known, prefix, bits), count)
        known, prefix, count = known + bits, prefix << bits | bin_index, count - before
    assert known == 32
    return below_with_ties(score, prefix, count)


SCORES = st.lists(
    st.one_of(
        st.sampled_from([0.0, -0.0, 1.0, 1e-45, 3e38, float("inf"), -1.5]),
        st.floats(width=32, allow_nan=False),
    ),
    min_size=1,
    max_size=60,
)


@settings(max_examples=200, deadline=None)
@given(SCORES, st.data())
def test_histograms_and_kthvalue_agree_with_the_reference(values: list[float], data: st.DataObject) -> None:
    score = torch.tensor(values, dtype=torch.float32)
    count = data.draw(st.integers(1, len(values)))
    expected = smallest_reference(score, count)
    assert int(expected.sum()) == count
    assert torch.equal(by_histograms(score, count), expected)
    assert torch.equal(smallest_in_rows(score[None], count)[0], expected)
    keys = sortable_keys(score)
    assert torch.equal(histogram(score, 0, 0, 16), torch.bincount(keys >> 16, minlength=1 << 16))
    high = int(keys[0] >> 16)
    low = torch.bincount(keys[(keys >> 16) == high] & 0xFFFF, minlength=1 << 16)
    assert torch.equal(histogram(score, 16, high, 16), low)
    assert torch.equal(keys.argsort(stable=True), torch.sort(score + 0.0, stable=True).indices)


def test_rows_are_compared_by_themselves_and_ties_go_by_index() -> None:
    score = torch.tensor([[1.0, 1.0, 1.0, 1.0], [4.0, 3.0, 2.0, 1.0]])
    expected = torch.tensor([[True, True, False, False], [False, False, True, True]])
    assert torch.equal(smallest_in_rows(score, 2), expected)
    assert not smallest_in_rows(score, 0).any()
    assert smallest_in_rows(score, 4).all()


@pytest.mark.parametrize(("keep", "group"), [(2, 4), (4, 8), (1, 4), (3, 4), (4, 4), (1, 2), (5, 7)])
def test_every_group_loses_exactly_what_it_should(keep: int, group: int) -> None:
    torch.manual_seed(0)
    score = torch.randint(0, 4, (6, 5 * group)).float()
    mask = smallest_in_groups(score, keep, group)
    assert (mask.view(6, 5, group).sum(dim=2) == group - keep).all()
    for row in range(6):
        for start in range(0, 5 * group, group):
            piece = slice(start, start + group)
            assert torch.equal(mask[row, piece], smallest_reference(score[row, piece], group - keep))


@pytest.mark.parametrize("columns", [1, 3, 64, 1000, 5000])
def test_rows_of_any_width_are_selected_exactly(columns: int) -> None:
    torch.manual_seed(0)
    score = torch.stack([torch.randn(columns), torch.rand(columns) * 1e-40, torch.zeros(columns)])
    for count in {1, columns // 2, columns} - {0}:
        mask = smallest_in_rows(score, count)
        assert all(torch.equal(row, smallest_reference(own, count)) for row, own in zip(mask, score, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_where_leaves_the_others_alone(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    values = torch.randn(7, 33, dtype=dtype)
    values[0, :4] = torch.tensor([float("inf"), -0.0, float("inf"), float("-inf")])
    mask = torch.rand(7, 33) < 0.5
    mask[0, :4] = torch.tensor([True, False, False, True])
    expected = values.masked_fill(mask, 0.0)
    zero_where_(values, mask)
    assert torch.equal(values, expected)
    assert not torch.signbit(values[mask]).any()
    assert torch.signbit(values[0, 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # loops, and what a GPU does
def test_each_row_may_lose_a_number_of_its_own(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    score = torch.randint(-3, 9, (31, 30), generator=generator).to(dtype) / 7  # many ties
    score[3, ::4] = float("inf")
    score[4, ::3] = -0.0
    counts = torch.arange(31)
    expected = torch.stack([smallest_reference(row, count) for count, row in enumerate(score)])
    assert torch.equal(smallest_by_row(score, counts), expected)
    assert torch.equal(counts, torch.arange(31))


def test_scores_of_another_precision_are_compared_in_it() -> None:
    score = 1 + torch.tensor([[3e-16, 0.0, 2e-15, 1e-15, 5e-15, 4e-15, 0.0, 3e-15]], dtype=torch.float64)
    assert torch.equal(smallest_in_rows(score, 4), smallest_reference(score, 4))
    assert smallest_in_groups(score, 2, 4).tolist() == [[True, True, False, False, False, False, True, True]]
