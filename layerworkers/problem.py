"""The least-squares problem of the linears that share one input, with its factorisations made once and shared.

Legend: C input channels. G = X^T X, the Gram matrix of the calibration tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from billhook.kernels.factor import NotPositiveDefiniteError, inverse_, inverse_upper_factor_
from billhook.kernels.gram import mirror_lower_
from billhook.layerworkers.collective import Collective, Load, broadcast, broadcast_tensor_, tensor_load
from billhook.layerworkers.errors import RunError
from billhook.layerworkers.stopwatch import Stopwatch
from billhook.layerworkers.triangles import broadcast_symmetric_, broadcast_upper_, triangle_load

_Broadcast = Callable[[Collective, int, Tensor], None]
"""Makes a matrix the root's on all workers."""

LADDER = (1.0, 3.0, 10.0, 30.0, 100.0)
"""Multiples of the asked damping that are tried in turn when a Gram matrix is not positive definite in float32."""


_DAMPING_BYTES = 8
"""One damping; more where it had to be raised."""


def column_squares_load(columns: int) -> Load:
    """Return what each further solver is sent by :meth:`LinearProblem.column_squares`."""
    return Load(((4 * columns,),))


def inverse_factor_load(columns: int) -> Load:
    """Return what each further solver is sent by :meth:`LinearProblem.inverse_factor`."""
    return Load(((_DAMPING_BYTES,),)) + triangle_load(columns)


def normalised_load(columns: int) -> Load:
    """Return what each further solver is sent by :meth:`LinearProblem.normalised`."""
    return Load(((_DAMPING_BYTES + 4 * columns,),)) + tensor_load((columns, columns)) + triangle_load(columns)


@dataclass(frozen=True)
class Normalised:
    """ADMM's form of the problem (arXiv 2401.02938): unit-diagonal Gram with its ridge, and one inverse."""

    norms_C: Tensor
    """``sqrt(G_jj) + 1e-8``: 2-norm of each input channel, [C]."""
    gram_CC: Tensor
    """``A = G / (norms norms^T) + ridge I``, [C, C]."""
    inverse_CC: Tensor
    """``(A + rho I)^-1``, [C, C]."""


@dataclass
class LinearProblem:
    """What a method may ask about a linear's input. Every question is collective over ``solvers``.

    The factorisation behind an answer is computed on one worker (rank 0 of ``solvers``) and sent to the others; it is
    kept for the other linears with the same input. It overwrites the statistic: a group of linears can be solved by
    one form of the problem only.
    """

    statistic: Tensor | None
    """The reduced statistic, on rank 0 of ``solvers``; None elsewhere, and for methods that need none."""
    columns: int
    partition_rows: int
    """Rows of a linear in one matrix product: a constant of the recipe, since it decides bits."""
    solvers: Collective
    device: torch.device
    watch: Stopwatch = field(default_factory=Stopwatch)
    dampings: list[float] = field(default_factory=list)
    """Relative dampings tried until the factorisation succeeded; one entry where the first did."""
    _answers: dict[tuple[object, ...], tuple[Tensor, ...]] = field(default_factory=dict)

    def column_squares(self) -> Tensor:
        """Return the squared 2-norm of each input channel, [C] float32."""
        return self._shared(("column squares",), (), lambda: (self._statistic(),))[0]

    def inverse_factor(self, damping: float) -> Tensor:
        """Return U [C, C], upper triangular with ``H^-1 = U^T U``, ``H = G + damping mean(diag G) I``.

        A dead channel (one that is zero in every token) weighs nothing: its U_jj is infinite and the rest of its row
        and column is 0, so its weights score 0, and removing one changes no other.

        Raises:
            RunError: when H is not positive definite even with a hundred times the damping.
        """

        def compute() -> tuple[Tensor, ...]:
            gram_CC = self._statistic()
            mirror_lower_(gram_CC)
            dead_C = gram_CC.diagonal() == 0
            mean = float(gram_CC.diagonal().double().mean()) or 1.0
            gram_CC.diagonal()[dead_C] = mean
            tried = self._climb(inverse_upper_factor_, gram_CC, [damping * step for step in LADDER], mean)
            gram_CC.diagonal()[dead_C] = torch.inf
            return gram_CC, torch.tensor(tried, dtype=torch.float64)

        factor_CC, tried = self._shared(("inverse factor", damping), (broadcast_upper_,), compute)
        self.dampings = tried.tolist()
        return factor_CC

    def normalised(self, ridge: float, rho: float) -> Normalised:
        """Return the unit-diagonal form with ``ridge mean(diag A)`` added to the diagonal, and ``(A + rho I)^-1``.

        Where ``A + rho I`` is not positive definite in float32, the ridge itself is raised, on both.

        Raises:
            RunError: when it is not even with a hundred times the ridge (with 1, for a ridge of 0).
        """

        def compute() -> tuple[Tensor, ...]:
            gram_CC = self._statistic()
            mirror_lower_(gram_CC)
            norms_C = gram_CC.diagonal().sqrt() + 1e-8
            gram_CC /= norms_C
            gram_CC /= norms_C[:, None]
            mean = float(gram_CC.diagonal().double().mean())
            inverse_CC = gram_CC.clone()
            inverse_CC.diagonal().add_(rho)
            ladder = [ridge * step for step in LADDER] if ridge > 0 else [0.0, *(step / LADDER[-1] for step in LADDER)]
            tried = self._climb(inverse_, inverse_CC, ladder, mean)
            gram_CC.diagonal().add_(tried[-1] * mean)
            return gram_CC, inverse_CC, norms_C, torch.tensor(tried, dtype=torch.float64)

        # Two divisions in a row, by one norm and by another, are not symmetric to the last bit: the Gram goes whole.
        ways = (broadcast_tensor_, broadcast_symmetric_)
        gram_CC, inverse_CC, norms_C, tried = self._shared(("normalised", ridge, rho), ways, compute)
        self.dampings = tried.tolist()
        return Normalised(norms_C, gram_CC, inverse_CC)

    def forget(self) -> None:
        """Give up the statistic and the factorisations."""
        self.statistic = None
        self._answers.clear()

    def _climb(
        self,
        factorise_: Callable[[Tensor, Sequence[float]], list[float]],
        matrix_CC: Tensor,
        dampings: list[float],
        unit: float,
    ) -> list[float]:
        if not torch.isfinite(matrix_CC.diagonal()).all():
            raise RunError("the Gram matrix is not finite: the activations of this linear overflowed float32")
        try:
            tried = factorise_(matrix_CC, [damping * unit for damping in dampings])
        except NotPositiveDefiniteError as error:
            raise RunError(
                f"the Gram matrix is not positive definite even with {dampings[-1]:g} damping "
                f"(tried {', '.join(f'{damping:g}' for damping in dampings)}); use more calibration samples, or raise "
                "the damping or ridge"
            ) from error
        return dampings[: len(tried)]

    def _statistic(self) -> Tensor:
        assert self.statistic is not None, "the statistic was consumed by another form of the problem"
        statistic, self.statistic = self.statistic, None
        return statistic

    def _shared(
        self, key: tuple[object, ...], ways: Sequence[_Broadcast], compute: Callable[[], tuple[Tensor, ...]]
    ) -> tuple[Tensor, ...]:
        """Return the answer of rank 0: a matrix for each of ``ways``, which say how it is sent, and then vectors."""
        if key not in self._answers:
            with self.watch.part("factors"):
                answer = compute() if self.solvers.rank == 0 else ()
            if self.solvers.size > 1:
                matrices, vectors = answer[: len(ways)], answer[len(ways) :]
                shapes, arrays = broadcast(
                    self.solvers,
                    0,
                    ([tuple(each.shape) for each in matrices], [each.cpu().numpy() for each in vectors]),
                )
                if self.solvers.rank != 0:
                    matrices = tuple(torch.empty(shape, dtype=torch.float32, device=self.device) for shape in shapes)
                    vectors = tuple(torch.from_numpy(array.copy()).to(self.device) for array in arrays)
                for broadcast_, matrix in zip(ways, matrices, strict=True):
                    broadcast_(self.solvers, 0, matrix)
                answer = (*matrices, *vectors)
            self._answers[key] = answer
        return self._answers[key]
