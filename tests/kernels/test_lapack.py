"""LAPACK without Python's lock: the same bits as through SciPy, and other threads go on."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from scipy.linalg import blas
from scipy.linalg import lapack as scipys

from billhook.kernels import lapack


def positive_definite(size: int) -> torch.Tensor:
    x = torch.randn(2 * size, size, generator=torch.Generator().manual_seed(0))
    return x.T @ x


@pytest.mark.parametrize("size", [1, 7, 130])
def test_the_same_bits_as_through_scipy(size: int) -> None:
    ours, theirs = positive_definite(size), positive_definite(size)
    x = torch.randn(5, size)
    lapack.add_gram(ours, x)
    blas.ssyrk(1.0, x.numpy().T, beta=1.0, c=theirs.numpy().T, overwrite_c=1, lower=0)
    assert torch.equal(ours, theirs)
    assert lapack.cholesky(ours)
    scipys.spotrf(theirs.numpy().T, lower=0, clean=0, overwrite_a=1)
    assert torch.equal(ours, theirs)
    inverse = ours.clone()
    assert lapack.invert_triangle(inverse)
    assert torch.equal(inverse, torch.from_numpy(scipys.strtri(theirs.numpy().T, lower=0)[0].T))
    assert lapack.invert_from_cholesky(ours)
    assert torch.equal(ours, torch.from_numpy(scipys.spotri(theirs.numpy().T, lower=0)[0].T))


def test_what_cannot_be_done_is_said() -> None:
    assert not lapack.cholesky(-torch.eye(3))
    assert not lapack.invert_triangle(torch.zeros(3, 3))


def test_other_threads_go_on_meanwhile() -> None:
    """A worker's heartbeat is one."""
    matrix, beats, done = positive_definite(1500), [time.monotonic()], threading.Event()

    def beat() -> None:
        while not done.wait(0.001):
            beats.append(time.monotonic())

    thread = threading.Thread(target=beat)
    thread.start()
    begin = time.monotonic()
    for _ in range(5):
        assert lapack.cholesky(matrix.clone())
    took = time.monotonic() - begin
    done.set()
    thread.join()
    assert sum(begin < at < begin + took for at in beats) > 10


@pytest.mark.parametrize("matrix", [torch.eye(3).double(), torch.eye(6)[::2, ::2]], ids=["double", "with gaps"])
def test_what_would_be_read_wrongly_is_not_read(matrix: torch.Tensor) -> None:
    with pytest.raises(AssertionError):
        lapack.cholesky(matrix)
