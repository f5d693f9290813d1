import pytest
import torch

from billhook.kernels.factor import (
    NotPositiveDefiniteError,
    cholesky_lower_,
    inverse_,
    inverse_upper_factor_,
    reverse_,
    upper_factor_reference,
)
from billhook.kernels.gram import gram_reference


def spd(size: int, tokens: int | None = None) -> torch.Tensor:
    torch.manual_seed(size)
    x = torch.randn(tokens or 3 * size, size) * torch.logspace(-1, 1, size)
    return gram_reference(x).float()


@pytest.mark.parametrize("size", [1, 2, 37, 128, 1030])
def test_reverse_is_a_flip_of_both_axes(size: int) -> None:
    a = torch.randn(size, size)
    reversed_ = a.clone()
    reverse_(reversed_)
    assert torch.equal(reversed_, a.flip(0, 1))


@pytest.mark.parametrize("size", [1, 2, 37, 128, 530])
def test_inverse_upper_factor_agrees_with_its_reference(size: int) -> None:
    h = spd(size)
    factor = h.clone()
    assert inverse_upper_factor_(factor, [0.5]) == [0.5]
    assert torch.equal(factor, factor.triu())
    expected = upper_factor_reference(h + 0.5 * torch.eye(size))
    assert torch.allclose(factor.double(), expected, rtol=1e-3, atol=1e-5)


def test_the_diagonal_of_the_factor_is_the_leading_entry_of_the_trailing_inverse() -> None:
    h = spd(20).double()
    factor = h.float()
    inverse_upper_factor_(factor, [0.0])
    for j in (0, 7, 19):
        leading = torch.linalg.inv(h[j:, j:])[0, 0]
        assert float(factor[j, j]) ** 2 == pytest.approx(float(leading), rel=1e-3)


@pytest.mark.parametrize("size", [1, 37, 530])
def test_inverse(size: int) -> None:
    a = spd(size)
    inverse = a.clone()
    inverse_(inverse, [1.0])
    expected = torch.linalg.inv(a.double() + torch.eye(size))
    assert torch.equal(inverse, inverse.T)
    assert torch.allclose(inverse.double(), expected, rtol=1e-3, atol=1e-4)


def test_a_failed_attempt_is_undone_and_the_ladder_is_climbed() -> None:
    singular = torch.ones(40, 40)
    singular[0, 1] = singular[1, 0] = 2.0  # indefinite: eigenvalue -1 in the first two coordinates
    factor = singular.clone()
    tried = cholesky_lower_(factor, [0.0, 0.5, 3.0, 100.0])
    assert tried == [0.0, 0.5, 3.0]
    lower = factor.tril()
    assert torch.allclose(lower @ lower.T, singular + 3.0 * torch.eye(40), atol=1e-4)
    assert torch.equal(factor.triu(1), singular.triu(1))


def test_the_end_of_the_ladder_is_an_error_not_an_identity() -> None:
    with pytest.raises(NotPositiveDefiniteError):
        inverse_upper_factor_(-spd(10), [0.01, 0.1])
