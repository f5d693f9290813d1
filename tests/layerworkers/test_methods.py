"""Identities that each method must satisfy, on small problems."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch

from billhook.kernels.gram import add_gram_, gram_reference
from billhook.layerworkers.collective import Alone
from billhook.layerworkers.errors import InputError, RunError
from billhook.layerworkers.methods import METHODS, Solution, method_named
from billhook.layerworkers.patterns import NM, Pattern, PerRow, Selector, Unstructured
from billhook.layerworkers.problem import LinearProblem

HALF = Unstructured(Fraction(1, 2))

ALL = [
    *METHODS,
    "wanda+dsnot",
    "wanda+swaps",
    "sparsegpt+swaps",
    "wanda+refit",
    "admm+refit",
    "wanda+swaps+exact-refit",
]
"""Every method and every refinement."""
MASKS = ["magnitude", "wanda", "wanda-cumulative", "ria", "wanda+dsnot", "wanda+swaps"]
"""Those that leave the survivors alone."""
SOLVERS = ["sparsegpt", "thanos", "net-trim", "iht", "admm", "alps", "wanda+refit"]
"""Those that update them."""


def activations(tokens: int = 400, columns: int = 96) -> torch.Tensor:
    """Correlated inputs with channels of very different size."""
    generator = torch.Generator().manual_seed(3)
    mixing = torch.eye(columns) + 0.3 * torch.randn(columns, columns, generator=generator)
    sizes = torch.logspace(-1, 1, columns)[torch.randperm(columns, generator=generator)]
    return torch.randn(tokens, columns, generator=generator) @ mixing * sizes


def weights(rows: int = 48, columns: int = 96) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(4))


def solve(name: str, w: torch.Tensor, x: torch.Tensor, pattern: Pattern, **options: Any) -> Solution:
    solution, _ = solve_with_problem(name, w, x, pattern, **options)
    return solution


def solve_with_problem(
    name: str, w: torch.Tensor, x: torch.Tensor, pattern: Pattern, **options: Any
) -> tuple[Solution, LinearProblem]:
    method = method_named(name)
    statistic = None
    if method.statistic is not None:
        statistic = torch.zeros(method.statistic.shape(x.shape[1]))
        method.statistic.add_(statistic, x)
    problem = LinearProblem(statistic, x.shape[1], 16, Alone(), torch.device("cpu"), forms=len(method.forms))
    gradient_squares = torch.rand(w.shape, generator=torch.Generator().manual_seed(2)) * x.square().sum(dim=0)
    problem.turn_to(w, lambda first, last: gradient_squares[first:last].clone())
    select = Selector(pattern, method.within_rows, Alone())
    return method.solve(w.clone(), problem, select, method.options(**options)), problem


def output_error(sparse: torch.Tensor, dense: torch.Tensor, x: torch.Tensor) -> float:
    change = (sparse - dense).double()
    gram = gram_reference(x)
    return float((change @ gram * change).sum() / (dense.double() @ gram * dense.double()).sum())


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("sparsity", ["0", "0.3", "0.5", "0.7", "0.99"])
def test_unstructured_counts_are_exact(name: str, sparsity: str) -> None:
    w, x, share = weights(), activations(), Fraction(sparsity)
    solution = solve(name, w, x, Unstructured(share))
    rows, columns = w.shape
    within_rows = method_named(name).within_rows
    expected = rows * int(share * columns) if within_rows else int(share * rows * columns)
    assert solution.removed == expected
    assert int((solution.weight_RC == 0).sum()) == expected
    if share == 0:
        assert torch.allclose(solution.weight_RC, w, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(("keep", "group"), [(2, 4), (4, 8), (1, 4), (3, 4), (1, 3)])
def test_every_group_of_an_nm_pattern_keeps_n(name: str, keep: int, group: int) -> None:
    w, x = weights(), activations()
    solution = solve(name, w, x, NM(keep, group))
    kept = (solution.weight_RC.view(48, -1, group) != 0).sum(dim=2)
    assert (kept == keep).all()
    assert solution.removed == w.numel() * (group - keep) // group


@pytest.mark.parametrize("name", [name for name in ALL if method_named(name).within_rows])
def test_what_compares_rows_by_themselves_takes_as_many_from_each(name: str) -> None:
    sparse = solve(name, weights(), activations(), HALF).weight_RC
    assert ((sparse == 0).sum(dim=1) == 48).all()


@pytest.mark.parametrize("name", [name for name in ALL if method_named(name).within_rows])
def test_it_takes_another_number_from_each_where_it_is_told_so(name: str) -> None:
    counts = tuple((7 * row) % 97 for row in range(48))
    solution = solve(name, weights(), activations(), PerRow(counts, 96))
    assert tuple((solution.weight_RC == 0).sum(dim=1).tolist()) == counts
    assert solution.removed == sum(counts)


@pytest.mark.parametrize("block", [1, 7, 32, 96, 128])
def test_sparsegpt_prunes_each_block_of_columns_by_the_share(block: int) -> None:
    solution = solve("sparsegpt", weights(), activations(), HALF, block=block)
    for start in range(0, 96, block):
        piece = solution.weight_RC[:, start : start + block]
        assert int((piece == 0).sum()) == piece.numel() // 2


@pytest.mark.parametrize("name", MASKS)
def test_mask_methods_leave_survivors_alone(name: str) -> None:
    w = weights()
    sparse = solve(name, w, activations(), HALF).weight_RC
    kept = sparse != 0
    assert torch.equal(sparse[kept], w[kept])


@pytest.mark.parametrize("pattern", [HALF, NM(2, 4)])
@pytest.mark.parametrize("damping", [0.01, 0.3])
def test_sparsegpt_loss_is_half_the_quadratic_form_under_the_damped_gram(pattern: Pattern, damping: float) -> None:
    w, x = weights(), activations()
    solution = solve("sparsegpt", w, x, pattern, damping=damping, block=32)
    gram = gram_reference(x)
    damped = gram + damping * gram.diagonal().mean() * torch.eye(96)
    change = solution.weight_RC.double() - w.double()
    assert sum(solution.loss) == pytest.approx(0.5 * float((change @ damped * change).sum()), rel=1e-4)
    assert sum(solution.energy) == pytest.approx(0.5 * float((w.double() @ damped * w.double()).sum()), rel=1e-4)


@pytest.mark.parametrize("pattern", [HALF, NM(2, 4)])
def test_sparsegpt_loss_identity_in_float64(pattern: Pattern, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same identity to 1e-6 and beyond: with float64 inputs to the same solve, only rounding is left."""
    from billhook.kernels import factor, sweep
    from billhook.layerworkers.methods import sparsegpt

    def factor_in_float64(h: torch.Tensor, dampings: list[float]) -> list[float]:
        h.copy_(factor.upper_factor_reference(h + dampings[0] * torch.eye(len(h), dtype=h.dtype)))
        return [dampings[0]]

    monkeypatch.setattr("billhook.layerworkers.problem.inverse_upper_factor_", factor_in_float64)
    monkeypatch.setattr(sparsegpt, "sweep_masked", sweep.sweep_masked_reference)
    monkeypatch.setattr(sparsegpt, "sweep_groups", sweep.sweep_groups_reference)
    w, gram = weights().double(), gram_reference(activations())
    problem = LinearProblem(gram.clone(), 96, 16, Alone(), torch.device("cpu"))
    select_score = Selector(pattern, False, Alone())

    class SelectInFloat32(Selector):
        def __call__(self, score_RC: torch.Tensor) -> torch.Tensor:
            return select_score(score_RC.float())

    select = SelectInFloat32(pattern, False, Alone())
    solution = sparsegpt.solve(w.clone(), problem, select, sparsegpt.Options(block=32))
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(96)
    change = solution.weight_RC - w
    assert sum(solution.loss) == pytest.approx(0.5 * float((change @ damped * change).sum()), rel=1e-9)


@pytest.mark.parametrize("pattern", [HALF, NM(2, 4)])
def test_with_a_diagonal_gram_sparsegpt_leaves_survivors_alone(pattern: Pattern) -> None:
    w = weights()
    x = torch.diag(torch.rand(96, generator=torch.Generator().manual_seed(0)) + 0.5)
    sparse = solve("sparsegpt", w, x, pattern).weight_RC
    kept = sparse != 0
    assert torch.equal(sparse[kept], w[kept])


def test_with_a_diagonal_gram_and_no_damping_sparsegpt_and_wanda_choose_alike() -> None:
    w = weights(rows=1)
    x = torch.diag(torch.rand(96, generator=torch.Generator().manual_seed(0)) + 0.5)
    ours = solve("sparsegpt", w, x, HALF, damping=1e-9, block=96).weight_RC
    assert torch.equal(ours == 0, solve("wanda", w, x, HALF).weight_RC == 0)


@pytest.mark.parametrize("name", [name for name in ALL if name not in ("magnitude", "wanda+dsnot")])
def test_the_scale_of_the_inputs_does_not_matter(name: str) -> None:
    w, x = weights(), activations()
    small, large = solve(name, w, x, HALF).weight_RC, solve(name, w, x * 64, HALF).weight_RC
    assert torch.equal(small == 0, large == 0)
    assert torch.allclose(small, large, rtol=1e-3, atol=1e-4)


def test_admm_is_equivariant_under_column_scales() -> None:
    w, x = weights(), activations()
    scales = torch.logspace(-1, 1, 96)
    plain, scaled = solve("admm", w, x, HALF).weight_RC, solve("admm", w / scales, x * scales, HALF).weight_RC * scales
    assert float(((plain == 0) != (scaled == 0)).float().mean()) < 0.001
    assert output_error(plain, w, x) == pytest.approx(output_error(scaled, w, x), rel=1e-3)


def test_admm_reaches_the_least_squares_weights_of_its_support() -> None:
    w, x = weights(rows=8), activations()
    solution, _ = solve_with_problem("admm", w, x, HALF, iterations=60)
    gram = gram_reference(x)
    norms = gram.diagonal().sqrt()
    a = gram / norms / norms[:, None] + 0.1 * torch.eye(96)
    for row in range(8):
        support = (solution.weight_RC[row] != 0).nonzero().flatten()
        target = a @ (w[row].double() * norms)
        best = torch.linalg.solve(a[support][:, support], target[support])
        assert torch.allclose((solution.weight_RC[row].double() * norms)[support], best, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("pattern", [HALF, Unstructured(Fraction(7, 10)), NM(2, 4)])
def test_each_method_is_better_than_the_one_before(pattern: Pattern) -> None:
    w, x = weights(), activations()
    names = ["magnitude", "wanda", "sparsegpt", "admm"]
    errors = [output_error(solve(name, w, x, pattern).weight_RC, w, x) for name in names]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.6 * errors[1]


@pytest.mark.parametrize("pattern", [HALF, Unstructured(Fraction(7, 10)), NM(2, 4)])
@pytest.mark.parametrize("name", SOLVERS)
def test_solvers_are_far_better_than_their_mask_without_an_update(name: str, pattern: Pattern) -> None:
    w, x = weights(), activations()
    sparse = solve(name, w, x, pattern).weight_RC
    assert output_error(sparse, w, x) < 0.9 * output_error(w * (sparse != 0), w, x)
    assert output_error(sparse, w, x) < 0.9 * output_error(solve("wanda", w, x, pattern).weight_RC, w, x)


@pytest.mark.parametrize("name", ["net-trim", "iht", "alps", "wanda+refit", "sparsegpt+exact-refit"])
def test_refitted_weights_fulfil_the_normal_equations_of_their_support(name: str) -> None:
    w, x = weights(rows=8), activations()
    steps = {} if "exact" in name else {"refit_steps": 100}
    sparse = solve(name, w, x, HALF, **steps).weight_RC
    gram = gram_reference(x)
    norms = gram.diagonal().sqrt()
    a = gram / norms / norms[:, None] + 0.1 * torch.eye(96)
    gradient = ((sparse - w).double() * norms) @ a
    scale = (w.double() * norms @ a).abs().max()
    assert float(gradient[sparse != 0].abs().max()) < 1e-4 * float(scale)


def test_the_loss_of_what_is_refined_is_its_quadratic_form() -> None:
    w, x = weights(), activations()
    gram = gram_reference(x)
    norms = gram.diagonal().sqrt()
    a = gram / norms / norms[:, None] + 0.1 * torch.eye(96)
    for name in ("admm", "alps", "iht", "net-trim", "wanda+swaps", "wanda+refit", "wanda+exact-refit"):
        solution = solve(name, w, x, HALF)
        change = (solution.weight_RC - w).double() * norms
        dense = w.double() * norms
        assert sum(solution.loss) == pytest.approx(float((change @ a * change).sum()), rel=1e-3), name
        assert sum(solution.energy) == pytest.approx(float((dense @ a * dense).sum()), rel=1e-3), name


def test_refinements_never_raise_the_loss() -> None:
    w, x = weights(), activations()
    losses = [
        sum(solve(name, w, x, HALF).loss) for name in ("wanda+swaps", "wanda+swaps+refit", "wanda+swaps+exact-refit")
    ]
    assert losses == sorted(losses, reverse=True)


def test_alps_is_at_least_as_good_as_admm_on_the_gram_that_it_sees() -> None:
    w, x = weights(), activations()
    for pattern in (HALF, Unstructured(Fraction(7, 10)), NM(2, 4)):
        assert sum(solve("alps", w, x, pattern).loss) < 1.02 * sum(solve("admm", w, x, pattern).loss)


def test_each_solver_finds_nearly_the_best_of_all_supports_of_a_small_problem() -> None:
    from itertools import combinations

    ratios: dict[str, list[float]] = {name: [] for name in ("admm", "alps", "wanda+swaps+refit")}
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(64, 8, generator=generator) @ (torch.eye(8) + 0.4 * torch.randn(8, 8, generator=generator))
        w = torch.randn(1, 8, generator=generator)
        gram = gram_reference(x)
        norms = gram.diagonal().sqrt()
        a = gram / norms / norms[:, None] + 0.1 * torch.eye(8)
        dense = (w.double() * norms)[0]

        def objective(v: torch.Tensor, a: torch.Tensor = a, dense: torch.Tensor = dense) -> float:
            return float((v - dense) @ a @ (v - dense))

        best = float("inf")
        for support in map(list, combinations(range(8), 4)):
            v = torch.zeros(8, dtype=torch.float64)
            v[support] = torch.linalg.solve(a[support][:, support], a[support] @ dense)
            best = min(best, objective(v))
        for name, own in ratios.items():
            own.append(objective((solve(name, w, x, HALF).weight_RC.double() * norms)[0]) / best)
    for name, own in ratios.items():
        assert min(own) >= 1 - 1e-5, name
        assert sorted(own)[len(own) // 2] < 1.5, name
        assert max(own) < 4, name


def test_ria_with_exponent_zero_and_rows_alike_looks_at_columns_alone() -> None:
    w = torch.tensor([[4.0, 1.0, 2.0, 3.0], [1.0, 4.0, 3.0, 2.0]])
    sparse = solve("ria", w, activations(columns=4), HALF, exponent=0.0).weight_RC
    assert torch.equal(sparse == 0, w < 2.5)


def test_wanda_cumulative_takes_the_same_share_of_scores_from_each_row() -> None:
    w, x = weights(rows=200), activations()
    w[:100] = w[:100].sign() * w[:100].abs() ** 4  # uneven: few large ones
    sparse = solve("wanda-cumulative", w, x, HALF).weight_RC
    score = w.abs() * gram_reference(x).diagonal().sqrt()
    gone = (score * (sparse == 0)).sum(dim=1) / score.sum(dim=1)
    assert float(gone.max() - gone.min()) < 0.05
    counts = (sparse == 0).sum(dim=1)
    assert counts[:100].float().mean() > 1.2 * counts[100:].float().mean()


def test_thanos_with_one_column_a_block_is_sparsegpt_on_the_same_mask() -> None:
    """The update then is the sweep's; for N:M with groups of one column nothing is chosen, so a mask is forced."""
    from billhook.kernels.joint import remove_jointly_
    from billhook.kernels.sweep import sweep_masked_reference

    torch.manual_seed(0)
    u = torch.randn(12, 12).triu() + 4 * torch.eye(12)
    w, prune = torch.randn(6, 12), torch.rand(6, 12) < 0.5
    swept = w.clone()
    errors = sweep_masked_reference(swept, u, prune)
    jointly = w.clone()
    for column in range(12):
        block = jointly[:, column : column + 1].clone()
        e = remove_jointly_(block, u[column : column + 1, column : column + 1], prune[:, column : column + 1], 16)
        assert torch.allclose(e, errors[:, column : column + 1], atol=1e-5)
        jointly[:, column : column + 1] = block
        jointly[:, column + 1 :] -= e @ u[column : column + 1, column + 1 :]
    assert torch.allclose(jointly, swept, atol=1e-5)


@pytest.mark.parametrize("pattern", [HALF, NM(2, 4)])
def test_thanos_updates_to_the_best_weights_of_one_block(pattern: Pattern) -> None:
    """With all columns in one block, the update is the least-squares refit on the mask, exactly."""
    w, x = weights(rows=8), activations()
    sparse = solve("thanos", w, x, pattern, block=96).weight_RC
    gram = gram_reference(x)
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(96)
    for row in range(8):
        support = (sparse[row] != 0).nonzero().flatten()
        best = torch.linalg.solve(damped[support][:, support], damped[support] @ w[row].double())
        assert torch.allclose(sparse[row].double()[support], best, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("pattern", [HALF, NM(2, 4)])
def test_the_loss_of_thanos_is_half_the_quadratic_form(pattern: Pattern) -> None:
    w, x = weights(), activations()
    solution = solve("thanos", w, x, pattern, block=32)
    gram = gram_reference(x)
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(96)
    change = solution.weight_RC.double() - w.double()
    assert sum(solution.loss) == pytest.approx(0.5 * float((change @ damped * change).sum()), rel=1e-4)


def test_dsnot_brings_the_mean_of_the_outputs_nearer() -> None:
    w, x = weights(), activations() + 2.0
    means = x.double().mean(dim=0)
    before, after = (
        ((solve(name, w, x, HALF).weight_RC.double() - w) @ means).abs() for name in ("wanda", "wanda+dsnot")
    )
    assert (after <= before + 1e-4).all()
    assert after.mean() < 0.5 * before.mean()


def test_the_cubic_schedule_of_admm_ends_at_the_same_count_and_a_like_error() -> None:
    w, x = weights(), activations()
    for pattern in (HALF, NM(2, 4)):
        constant = solve("admm", w, x, pattern)
        cubic = solve("admm", w, x, pattern, schedule="cubic")
        assert cubic.removed == constant.removed
        assert not torch.equal(cubic.weight_RC == 0, constant.weight_RC == 0)
        assert sum(cubic.loss) == pytest.approx(sum(constant.loss), rel=0.15)


@pytest.mark.parametrize("name", ALL)
def test_dead_and_duplicate_channels_and_zero_weights(name: str) -> None:
    w, x = weights(), activations()
    x[:, 5] = 0
    x[:, 40] = 0
    x[:, 10] = x[:, 11]
    w[:, 60] = 0
    solution = solve(name, w, x, HALF)
    assert torch.isfinite(solution.weight_RC).all()
    assert all(torch.isfinite(torch.tensor(value)) for value in solution.loss + solution.energy)
    assert int((solution.weight_RC == 0).sum()) >= solution.removed == w.numel() // 2
    if name != "magnitude":
        assert (solution.weight_RC[:, 5] == 0).all(), "what weighs nothing is removed first"


@pytest.mark.parametrize("name", ALL)
def test_what_is_kept_of_a_dead_channel_keeps_its_value(name: str) -> None:
    w, x = weights(), activations()
    x[:, 5] = 0
    sparse = solve(name, w, x, Unstructured(Fraction(0))).weight_RC
    assert torch.allclose(sparse[:, 5], w[:, 5], rtol=1e-3, atol=1e-4)


def test_too_few_tokens_climb_the_ladder_and_each_step_is_recorded() -> None:
    x = torch.ones(1, 96) * 1e3
    _, problem = solve_with_problem("sparsegpt", weights(), x, HALF, damping=1e-9)
    assert len(problem.dampings) > 1
    assert problem.dampings == sorted(problem.dampings)


def test_a_raised_ridge_still_pulls_to_the_dense_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    from billhook.kernels import factor
    from billhook.layerworkers import problem as problems

    real, attempts = factor._try_cholesky_lower_, []

    def fails_once(a: torch.Tensor) -> bool:
        attempts.append(1)
        return len(attempts) > 1 and real(a)

    monkeypatch.setattr(factor, "_try_cholesky_lower_", fails_once)
    w = weights()
    solution, problem = solve_with_problem("admm", w, activations(), Unstructured(Fraction(0)))
    assert problem.dampings == [0.1, 0.1 * problems.LADDER[1]]
    assert torch.allclose(solution.weight_RC, w, rtol=1e-3, atol=1e-3)


def test_a_gram_that_no_damping_mends_is_an_error() -> None:
    method = METHODS["sparsegpt"]
    gram = torch.zeros(4, 4)
    gram.fill_diagonal_(1.0)
    gram[1, 0] = 1e6
    problem = LinearProblem(gram, 4, 16, Alone(), torch.device("cpu"))
    with pytest.raises(RunError, match=r"not positive definite.*more calibration samples"):
        method.solve(torch.ones(2, 4), problem, Selector(HALF, False, Alone()), method.options())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sparsegpt", {"damping": 0.0}),
        ("sparsegpt", {"block": 0}),
        ("admm", {"ridge": -1.0}),
        ("admm", {"rho": 0.0}),
        ("admm", {"reselections": 30}),
        ("admm", {"schedule": "linear"}),
        ("ria", {"exponent": -1.0}),
        ("alps", {"rho": 0.0}),
        ("alps", {"iterations": 1}),
        ("iht", {"iterations": 0}),
        ("net-trim", {"tolerance": 1.0}),
        ("wanda+refit", {"ridge": -1.0}),
        ("wanda+refit", {"refit_steps": 0}),
        ("wanda+swaps+refit", {"swaps": 0}),
        ("wanda+dsnot", {"cycles": 0}),
        ("wanda+dsnot", {"threshold": -1.0}),
    ],
)
def test_options_out_of_range_are_refused(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="expected"):
        method_named(name).options(**options)


def test_statistics_are_sums() -> None:
    x = activations()
    whole, parts = torch.zeros(96, 96), torch.zeros(96, 96)
    add_gram_(whole, x)
    for part in x.split(100):
        add_gram_(parts, part)
    assert torch.allclose(whole, parts, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("column", range(40, 44))
@pytest.mark.parametrize("pattern", [HALF, NM(2, 4)])
def test_sparsegpt_does_not_hide_a_nan(pattern: Pattern, column: int) -> None:
    w = weights()
    w[5, column] = torch.nan
    with pytest.raises(RunError, match="NaN"):
        solve("sparsegpt", w, activations(), pattern)
