import pytest
import torch

from billhook.kernels.products import matmul_by_rows, row_partitions


@pytest.mark.parametrize(("rows", "size"), [(1, 16), (16, 16), (17, 16), (31, 16), (32, 16), (1000, 256)])
def test_partitions_cover_the_rows_and_none_is_narrow(rows: int, size: int) -> None:
    partitions = list(row_partitions(rows, size))
    assert [row for start, stop in partitions for row in range(start, stop)] == list(range(rows))
    assert all(stop - start >= min(rows, size) for start, stop in partitions)
    assert all(start % size == 0 for start, _ in partitions)


def test_a_share_of_whole_partitions_has_the_bits_of_the_whole() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(150, 70), torch.randn(70, 45)
    whole = matmul_by_rows(a, b, 32)
    assert torch.equal(torch.cat([matmul_by_rows(a[:64], b, 32), matmul_by_rows(a[64:], b, 32)]), whole)
    assert torch.allclose(whole, a @ b, atol=1e-4)
