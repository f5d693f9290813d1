from __future__ import annotations

import torch
from threadpoolctl import ThreadpoolController

from billhook.kernels.threads import LARGEST_THREADED, safe_threads


def openblas_threads() -> list[int]:
    return [each["num_threads"] for each in ThreadpoolController().select(internal_api="openblas").info()]


def test_scipys_blas_has_one_thread_for_large_matrices_and_its_own_number_afterwards() -> None:
    before, torch_before = openblas_threads(), torch.get_num_threads()
    with safe_threads(LARGEST_THREADED + 1):
        assert set(openblas_threads()) == {1}
        assert torch.get_num_threads() == torch_before
    assert openblas_threads() == before
    with safe_threads(LARGEST_THREADED):
        assert openblas_threads() == before
