"""A method and refinements as one method."""

from __future__ import annotations

import dataclasses

import pytest
from ray import cloudpickle

from billhook.layerworkers.collective import Load
from billhook.layerworkers.errors import InputError
from billhook.layerworkers.methods import METHODS, REFINEMENTS, method_named
from billhook.layerworkers.problem import column_squares_load, inverse_factor_load, ridged_load


def test_a_method_alone_is_itself() -> None:
    for name, method in METHODS.items():
        assert method_named(name) is method


def test_a_chain_has_the_options_of_all_its_parts_and_common_ones_once() -> None:
    chained = method_named("admm+swaps+refit")
    assert [field.name for field in dataclasses.fields(chained.options)] == [
        *("ridge", "rho", "iterations", "reselections", "schedule", "swaps", "refit_steps")
    ]
    options = chained.options(ridge=0.3, swaps=5)
    assert (options.ridge, options.swaps, options.rho) == (0.3, 5, 1.0)
    assert dataclasses.asdict(cloudpickle.loads(cloudpickle.dumps(options))) == dataclasses.asdict(options)


def test_a_chain_needs_what_its_parts_need_and_no_form_twice() -> None:
    chained = method_named("sparsegpt+swaps+refit")
    assert chained.statistic == REFINEMENTS["refit"].statistic
    assert chained.forms == {"inverse factor", "ridged"}
    assert chained.shared(100) == inverse_factor_load(100) + ridged_load(100)
    assert method_named("wanda+dsnot").shared(100) == column_squares_load(100) + Load(((1600,),))
    assert method_named("iht+refit").forms == {"ridged"}


@pytest.mark.parametrize(
    ("name", "fit"),
    [
        ("wanda+swaps", "dense-block"),
        ("wanda+refit", "lockstep"),
        ("wanda+dsnot", "dense-block"),
        ("magnitude+refit", "lockstep"),
        ("sparsegpt+swaps", "lockstep"),
    ],
)
def test_a_chain_is_fitted_as_its_last_part_that_minds(name: str, fit: str) -> None:
    assert method_named(name).fit == fit


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wnada", r"--method wnada: unknown \(did you mean 'wanda'\?\); known are auto, magnitude, "),
        ("refit", r"--method refit: unknown"),
        ("wanda+", r"'' cannot follow a method; what can is dsnot, "),
        ("wanda+sparsegpt", r"'sparsegpt' cannot follow a method"),
        ("wanda+swap", r"'swap' cannot follow a method \(did you mean 'swaps'\?\)"),
        ("sparsegpt+dsnot", r"its parts need different statistics \(gram, moments\)"),
    ],
)
def test_what_is_no_chain_is_refused(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        method_named(name)
