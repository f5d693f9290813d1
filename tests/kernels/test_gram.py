from collections.abc import Iterator

import pytest
import torch

from billhook.kernels import gram as kernel
from billhook.kernels.gram import (
    add_column_squares_,
    add_cross_,
    add_gram_,
    add_gram_by_bands_,
    gram_reference,
    mirror_lower_,
)


@pytest.fixture(params=["as here", "without bfloat16"])
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "without bfloat16":
        monkeypatch.setattr(kernel, "cpu_multiplies_bfloat16", lambda: False)


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("tokens", [1, 7, 130])
@pytest.mark.parametrize("columns", [1, 5, 64, 97])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_add_gram_accumulates_the_lower_triangle(tokens: int, columns: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    parts = [torch.randn(tokens, columns).to(dtype) for _ in range(3)]
    gram = torch.zeros(columns, columns)
    for part in parts:
        add_gram_(gram, part)
    expected = gram_reference(torch.cat(parts))
    assert torch.allclose(gram.double().tril(), expected.tril(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_add_gram_leaves_what_is_above_the_diagonal_alone(dtype: torch.dtype) -> None:
    gram = torch.full((133, 133), 7.0)
    add_gram_(gram, torch.randn(10, 133).to(dtype))
    assert torch.equal(gram.triu(1), torch.full((133, 133), 7.0).triu(1))


@pytest.mark.parametrize("columns", [48, 144, 200])
@pytest.mark.parametrize("tokens", [512, 1025])
def test_products_of_bfloat16_are_exact_and_their_sums_do_not_depend_on_threads(columns: int, tokens: int) -> None:
    torch.manual_seed(0)
    small = torch.randint(-16, 17, (tokens, columns)).bfloat16()  # all sums of products are exact in float32
    exact, threads = torch.zeros(columns, columns), torch.get_num_threads()
    add_gram_(exact, small)
    assert torch.equal(exact.double(), gram_reference(small).tril())
    real, grams = torch.randn(tokens, columns).bfloat16() * 10.0 ** torch.randn(columns), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            grams.append(torch.zeros(columns, columns))
            add_gram_(grams[-1], real.bfloat16())
    finally:
        torch.set_num_threads(threads)
    scale = gram_reference(real.bfloat16()).diagonal().sqrt()
    assert torch.equal(*grams)
    assert ((grams[0].double() - gram_reference(real.bfloat16()).tril()) / scale / scale[:, None]).abs().max() < 1e-5


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e-40, 3e38])
def test_bfloat16_that_is_not_finite_is_seen_in_the_gram(value: float) -> None:
    x = torch.ones(9, 70).bfloat16()
    x[4, 60] = value
    gram = torch.zeros(70, 70)
    add_gram_(gram, x)
    expected = gram_reference(x).float().tril()
    assert torch.allclose(gram[60], expected[60], equal_nan=True)
    assert torch.allclose(gram[:, 60], expected[:, 60], equal_nan=True)
    assert torch.equal(gram[:60, :60], expected[:60, :60])


@pytest.fixture
def products_of_16_bits_on_the_cpu() -> Iterator[None]:
    """Torch multiplies 16-bit matrices into float32 on CUDA only; here is the same on the CPU."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("mm.dtype", lambda a, b, out_dtype: a.to(out_dtype) @ b.to(out_dtype), "CPU")
    yield
    library._destroy()


@pytest.mark.usefixtures("products_of_16_bits_on_the_cpu")
@pytest.mark.parametrize("columns", [1, 16, 97])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_bands_add_up_to_the_gram(columns: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(70, columns).to(dtype)
    gram = torch.ones(columns, columns)
    add_gram_by_bands_(gram, x, band_rows=16)
    assert torch.allclose(gram.double().tril(), (gram_reference(x) + 1).tril(), rtol=1e-5, atol=1e-5)
    assert (gram[:16, 16:] == 1).all(), "nothing is computed above the bands"


@pytest.mark.parametrize("size", [1, 2, 511, 512, 513, 1100])
def test_mirror_makes_the_matrix_symmetric(size: int) -> None:
    torch.manual_seed(0)
    lower = torch.randn(size, size)
    mirrored = lower.clone()
    mirror_lower_(mirrored)
    assert torch.equal(mirrored.tril(), lower.tril())
    assert torch.equal(mirrored, mirrored.T)


def test_column_squares_are_the_diagonal_of_the_gram() -> None:
    torch.manual_seed(0)
    x = torch.randn(50, 9).bfloat16()
    squares = torch.zeros(9)
    add_column_squares_(squares, x)
    assert torch.allclose(squares.double(), gram_reference(x).diagonal(), rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_cross_products_add_up(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    d, x = torch.randn(70, 24).to(dtype), torch.randn(70, 40).to(dtype)
    cross = torch.ones(24, 40)
    add_cross_(cross, d[:30], x[:30])
    add_cross_(cross, d[30:], x[30:])
    assert torch.allclose(cross.double(), 1 + d.double().T @ x.double(), atol=1e-4)
