"""Least squares on a given support: the weights that stay are chosen anew, the zeros stay.

Legend: R rows (outputs), C columns (inputs). For each row v, with dense weights v0, a support S and A [C, C] symmetric
positive definite, ``(v - v0) A (v - v0)^T`` is minimised over v that are zero outside S.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from billhook.kernels.factor import NotPositiveDefiniteError


def refit_reference(v0_RC: Tensor, keep_RC: Tensor, a_CC: Tensor) -> Tensor:
    """Return the minimiser, [R, C] in the dtype of ``v0_RC``, row by row: ``v_S = A_SS^-1 (A v0)_S``.

    Raises:
        NotPositiveDefiniteError: when an ``A_SS`` is not, to rounding.
    """
    fitted_RC = torch.zeros_like(v0_RC)
    for fitted_C, v0_C, keep_C in zip(fitted_RC, v0_RC, keep_RC, strict=True):
        support_S = keep_C.nonzero().flatten()
        factor_SS, info = torch.linalg.cholesky_ex(a_CC[support_S][:, support_S])
        if int(info):
            raise NotPositiveDefiniteError(0.0)
        right_S = a_CC[support_S] @ v0_C
        fitted_C[support_S] = torch.cholesky_solve(right_S[:, None], factor_SS).flatten()
    return fitted_RC


def refit_steps_(v_RC: Tensor, v0_RC: Tensor, keep_RC: Tensor, times_a: Callable[[Tensor], Tensor], steps: int) -> None:
    """Take ``steps`` steps of conjugate gradients from ``v_RC`` towards the minimiser, in place, each row by itself.

    The objective never rises, and after as many steps as the support has entries it is the least, but for rounding.
    Where A has a unit diagonal, the Jacobi preconditioner is the identity.

    v_RC: [R, C] float32, zero where ``keep_RC`` is not. times_a: returns the rows that it is given times A.
    """
    outside_RC = keep_RC.logical_not()
    residual_RC = times_a(v0_RC - v_RC).masked_fill_(outside_RC, 0.0)
    direction_RC = residual_RC.clone()
    square_R1 = _squares(residual_RC)
    for _ in range(steps):
        image_RC = times_a(direction_RC).masked_fill_(outside_RC, 0.0)
        step_R1 = _quotient(square_R1, (direction_RC * image_RC).sum(dim=1, keepdim=True))
        v_RC.addcmul_(step_R1, direction_RC)
        residual_RC.addcmul_(step_R1, image_RC, value=-1)
        before_R1, square_R1 = square_R1, _squares(residual_RC)
        direction_RC.mul_(_quotient(square_R1, before_R1)).add_(residual_RC)


def _squares(values_RC: Tensor) -> Tensor:
    return values_RC.square().sum(dim=1, keepdim=True)


def _quotient(above_R1: Tensor, below_R1: Tensor) -> Tensor:
    """Return the quotient; 0 where there is nothing to divide by, as in a row that has arrived."""
    return torch.where(below_R1 > 0, above_R1 / below_R1, 0.0)
