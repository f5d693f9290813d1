"""The least-squares problem of the linears that share one input, with its factorisations made once and shared.

Legend: R rows of a linear, C input channels, K deviations. G = X^T X, the Gram matrix of the calibration tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from billhook.kernels.factor import NotPositiveDefiniteError, inverse_, inverse_upper_factor_
from billhook.kernels.gram import mirror_lower_
from billhook.kernels.products import matmul_by_rows
from billhook.layerworkers.collective import Collective, Load, Rows, broadcast, broadcast_tensor_, tensor_load
from billhook.layerworkers.errors import IllConditionedError, NotFiniteError
from billhook.layerworkers.scratch import bands
from billhook.layerworkers.stopwatch import Stopwatch
from billhook.layerworkers.triangles import broadcast_symmetric_, broadcast_upper_, triangle_load

RowsOf = Callable[[int, int], Tensor]
"""``rows(first, last)`` gives rows of a matrix [R, C], which may be overwritten."""

_Broadcast = Callable[[Collective, int, Tensor], None]
"""Makes a matrix the root's on all workers."""

LADDER = (1.0, 3.0, 10.0, 30.0, 100.0)
"""Multiples of the asked damping that are tried in turn when a Gram matrix is not positive definite in float32."""


_COLUMN_MAGNITUDES = ("column magnitudes",)

_DAMPING_BYTES = 8
"""One damping; more where it had to be raised."""


def column_squares_load(columns: int) -> Load:
    """Return what each further solver is sent by :meth:`LinearProblem.column_squares`."""
    return Load(((4 * columns,),))


def moments_load(columns: int) -> Load:
    """Return what each further solver is sent by :meth:`LinearProblem.moments`."""
    return Load(((16 * columns,),))


def inverse_factor_load(columns: int) -> Load:
    """Return what each further solver is sent by :meth:`LinearProblem.inverse_factor`."""
    return Load(((_DAMPING_BYTES,),)) + triangle_load(columns)


def normalised_load(columns: int) -> Load:
    """Return what each further solver is sent by :meth:`LinearProblem.normalised`."""
    return Load(((_DAMPING_BYTES + 4 * columns,),)) + tensor_load((columns, columns)) + triangle_load(columns)


def ridged_load(columns: int) -> Load:
    """Return what each further solver is sent by :meth:`LinearProblem.ridged`."""
    return Load(((4 * columns,),)) + triangle_load(columns)


def spectral_load(columns: int) -> Load:
    """Return what each further solver is sent by :meth:`LinearProblem.spectral`."""
    return Load(((8 * columns,),)) + tensor_load((columns, columns))


def correction_load(columns: int, deviations: int) -> Load:
    """Return what each further solver is sent by :meth:`LinearProblem.corrected`."""
    return Load(((0,),)) + tensor_load((deviations, columns)) if deviations else Load(())


def correction_flops(columns: int, deviations: int) -> float:
    """Return what it computes on one worker: an inverse, and the product of the deviations with it."""
    return float(columns**3 + 2 * deviations * columns**2) if deviations else 0.0


CORRECTION_RIDGE = 0.1
"""Added to the unit-diagonal Gram where a deviation is explained by the input."""


@dataclass(frozen=True)
class Ridged:
    """The unit-diagonal Gram with a ridge, in which the channels of a row are multiplied by their norms."""

    norms_C: Tensor
    """``sqrt(G_jj) + 1e-8``: 2-norm of each input channel, [C]."""
    gram_CC: Tensor
    """``A = G / (norms norms^T) + ridge I``, [C, C], symmetric to the last bit."""


@dataclass(frozen=True)
class Spectral:
    """The same as :class:`Ridged` by its eigenvalues: ``A = Q diag(L) Q^T``."""

    norms_C: Tensor
    values_C: Tensor
    """L, [C], ascending; above 0."""
    vectors_CC: Tensor
    """Q, [C, C], a column each."""

    def times(self, v_RC: Tensor, of_value: Callable[[Tensor], Tensor], partition_rows: int) -> Tensor:
        """Return ``V f(A)``, [R, C], where ``of_value`` is f."""
        rotated_RC = matmul_by_rows(v_RC, self.vectors_CC, partition_rows).mul_(of_value(self.values_C))
        return matmul_by_rows(rotated_RC, self.vectors_CC.T, partition_rows)


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
    kept for the other linears with the same input. The last form of the Gram that is asked for is made in the
    statistic's place, others in copies.
    """

    statistic: Tensor | None
    """The reduced statistic, on rank 0 of ``solvers``; None elsewhere, and for methods that need none.

    Below a Gram there may be the products of deviations with the input, [C + K, C] in all.
    """
    columns: int
    partition_rows: int
    """Rows of a linear in one matrix product: a constant of the recipe, since it decides bits."""
    solvers: Collective
    device: torch.device
    watch: Stopwatch = field(default_factory=Stopwatch)
    forms: int = 1
    """Forms of the Gram that will be asked for."""
    dampings: list[float] = field(default_factory=list)
    """Relative dampings tried until the factorisation succeeded; one entry where the first did."""
    _diagonal_C: Tensor = field(default_factory=lambda: torch.empty(0))
    """Of the Gram, once that is overwritten."""
    _linear: Tensor = field(default_factory=lambda: torch.empty(0, 0))
    _gradient_squares: RowsOf | None = None
    _rows: Rows = (0, 0)
    _answers: dict[tuple[object, ...], tuple[Tensor, ...]] = field(default_factory=dict)

    def column_squares(self) -> Tensor:
        """Return the squared 2-norm of each input channel, [C] float32."""

        def compute() -> tuple[Tensor, ...]:
            if self.statistic is None:
                return (self._diagonal_C,)
            if self.statistic.dim() == 2:
                return (self.statistic.diagonal().clone(),)
            return (self.statistic[: self.columns].clone(),)

        return self._shared(("column squares",), (), compute)[0]

    def moments(self) -> Tensor:
        """Return the moments of the input, [4, C] float32: see :data:`billhook.layerworkers.statistics.MOMENTS`."""

        def compute() -> tuple[Tensor, ...]:
            assert self.statistic is not None
            return (self.statistic,)

        return self._shared(("moments",), (), compute)[0].view(4, -1)

    def ridged(self, ridge: float) -> Ridged:
        """Return the unit-diagonal form with ``ridge`` added to the diagonal: no factorisation is needed."""

        def compute() -> tuple[Tensor, ...]:
            gram_CC, norms_C = self._unit_diagonal()
            gram_CC.diagonal().add_(ridge)
            return gram_CC, norms_C

        gram_CC, norms_C = self._shared(("ridged", ridge), (broadcast_symmetric_,), compute)
        return Ridged(norms_C, gram_CC)

    def spectral(self, ridge: float) -> Spectral:
        """Return the eigenvalues and eigenvectors of the unit-diagonal Gram, ``ridge`` added to the values.

        They are computed in float64; values that rounding made smaller than a millionth are raised to it.
        """

        def compute() -> tuple[Tensor, ...]:
            gram_CC, norms_C = self._unit_diagonal()
            values_C, vectors_CC = torch.linalg.eigh(gram_CC.double())
            return vectors_CC.float().contiguous(), norms_C, (values_C + ridge).clamp_(min=1e-6).float()

        vectors_CC, norms_C, values_C = self._shared(("spectral", ridge), (broadcast_tensor_,), compute)
        return Spectral(norms_C, values_C, vectors_CC)

    def corrected(
        self, weight_RC: Tensor, first_row: int, share: float, of_output: bool, ridge: float = CORRECTION_RIDGE
    ) -> Tensor:
        """Return the weights whose outputs take back a share of the deviation of a dense stream, [R, C].

        ``W + s (D^T X) (G + ridge diag G)^-1``, where D [T, K] deviates from what the linear's output is added to,
        that output included (``of_output``: K counts the linear's rows), or else ``W + s W (D^T X) (...)^-1``, where D
        deviates from its input (K = C). weight_RC: dense rows of the linear, from ``first_row`` on.

        Raises:
            RunError: when the Gram is not positive definite even with a hundred times the ridge.
        """

        def compute() -> tuple[Tensor, ...]:
            assert self.statistic is not None
            gram_CC, cross_KC = self.statistic[: self.columns].clone(), self.statistic[self.columns :]
            norms_C = self._normalise_(gram_CC)
            ladder = [ridge * step for step in LADDER] if ridge > 0 else [0.0, *(step / LADDER[-1] for step in LADDER)]
            self._climb(inverse_, gram_CC, ladder, 1.0)
            for start, stop in bands(cross_KC.shape):
                cross_KC[start:stop] = (cross_KC[start:stop] / norms_C) @ gram_CC / norms_C
            return (cross_KC,)

        (cross_KC,) = self._shared(("correction",), (broadcast_tensor_,), compute)
        if of_output:
            return weight_RC + share * cross_KC[first_row : first_row + len(weight_RC)]
        return weight_RC + share * matmul_by_rows(weight_RC, cross_KC, self.partition_rows)

    def turn_to(self, linear: Tensor, gradient_squares: RowsOf | None = None) -> None:
        """Say which linear is solved next: all its rows, dense, [R, C] as on disk, which every solver has.

        gradient_squares: of some of its rows, in float32, where the method asks for them.
        """
        self._linear, self._gradient_squares = linear, gradient_squares
        self._rows = 0, len(linear)
        self._answers.pop(_COLUMN_MAGNITUDES, None)

    def turn_to_rows(self, first: int, last: int) -> None:
        """Say which rows of the linear at hand are solved next."""
        self._rows = first, last

    def gradient_squares(self) -> Tensor:
        """Return the mean over samples of the squared gradient of each weight of the rows at hand, [R, C] float32.

        A copy of its own, of what the method declares: see :attr:`billhook.layerworkers.methods.Method.rounds` and
        :attr:`billhook.layerworkers.methods.Method.model_gradients`.
        """
        assert self._gradient_squares is not None, "the method does not declare that it asks for gradients"
        return self._gradient_squares(*self._rows).to(self.device)

    def column_magnitudes(self) -> Tensor:
        """Return the 1-norm of each column over all rows of the linear at hand, [C] float32."""
        if _COLUMN_MAGNITUDES not in self._answers:
            sums_C = torch.zeros(self.columns, dtype=torch.float64)
            for start, stop in bands(self._linear.shape):
                sums_C += self._linear[start:stop].abs().sum(dim=0, dtype=torch.float64)
            self._answers[_COLUMN_MAGNITUDES] = (sums_C.to(self.device, torch.float32),)
        return self._answers[_COLUMN_MAGNITUDES][0]

    def inverse_factor(self, damping: float) -> Tensor:
        """Return U [C, C], upper triangular with ``H^-1 = U^T U``, ``H = G + damping mean(diag G) I``.

        A dead channel (one that is zero in every token) weighs nothing: its U_jj is infinite and the rest of its row
        and column is 0, so its weights score 0, and removing one changes no other.

        Raises:
            RunError: when H is not positive definite even with a hundred times the damping.
        """

        def compute() -> tuple[Tensor, ...]:
            gram_CC = self._gram()
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
            gram_CC = self._gram()
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
        self._check_finite(matrix_CC)
        try:
            tried = factorise_(matrix_CC, [damping * unit for damping in dampings])
        except NotPositiveDefiniteError as error:
            raise IllConditionedError(
                f"the Gram matrix is not positive definite even with {dampings[-1]:g} damping "
                f"(tried {', '.join(f'{damping:g}' for damping in dampings)}); use more calibration samples, or raise "
                "the damping or ridge"
            ) from error
        return dampings[: len(tried)]

    def _unit_diagonal(self) -> tuple[Tensor, Tensor]:
        """Return ``G / (norms norms^T)``, symmetric to the last bit, and the norms."""
        gram_CC = self._gram()
        return gram_CC, self._normalise_(gram_CC)

    def _normalise_(self, gram_CC: Tensor) -> Tensor:
        """Divide by the norms of the channels, which are returned; the lower triangle is meant."""
        norms_C = gram_CC.diagonal().sqrt() + 1e-8
        gram_CC /= norms_C
        gram_CC /= norms_C[:, None]
        mirror_lower_(gram_CC)
        self._check_finite(gram_CC)
        return norms_C

    def _gram(self) -> Tensor:
        """Return the Gram, of which the lower triangle is meant, to be overwritten by a form."""
        assert self.statistic is not None, "the Gram was overwritten by the last form that was promised"
        self.forms -= 1
        if self.forms > 0:
            return self.statistic[: self.columns].clone()
        statistic, self.statistic = self.statistic, None
        self._diagonal_C = statistic.diagonal().clone()
        return statistic[: self.columns]

    @staticmethod
    def _check_finite(gram_CC: Tensor) -> None:
        if not torch.isfinite(gram_CC.diagonal()).all():
            raise NotFiniteError("the Gram matrix is not finite: the activations of this linear overflowed float32")

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
