"""Matrix products whose bits do not depend on how rows are dealt to workers.

Legend: R rows of a linear's weight (outputs), C columns (inputs), K columns of the result.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor


def row_partitions(rows: int, partition_rows: int) -> Iterator[tuple[int, int]]:
    """Yield ``(start, stop)`` of each row partition of ``partition_rows`` rows; the last one takes the rest.

    No partition is narrower than ``partition_rows`` unless ``rows`` is: narrow products take other code paths in BLAS
    and may differ in the last bit.
    """
    count = max(1, rows // partition_rows)
    for index in range(count):
        yield index * partition_rows, rows if index == count - 1 else (index + 1) * partition_rows


def matmul_by_rows(a_RC: Tensor, b_CK: Tensor, partition_rows: int) -> Tensor:
    """Return ``A B`` [R, K], one product per row partition, so that a row's bits depend on its partition alone."""
    product_RK = a_RC.new_empty(a_RC.shape[0], b_CK.shape[1])
    for start, stop in row_partitions(a_RC.shape[0], partition_rows):
        product_RK[start:stop] = a_RC[start:stop] @ b_CK
    return product_RK
