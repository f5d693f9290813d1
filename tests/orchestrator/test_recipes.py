"""Recipes: the published schema and the examples, and what is said of keys that do not exist."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from billhook.layerworkers.methods import METHODS, REFINEMENTS, method_named
from billhook.orchestrator import InputError, plan
from billhook.orchestrator.cli import SETTERS, app
from billhook.orchestrator.devices import DEVICES
from billhook.orchestrator.recipe import Recipe, Resources, RunOptions, checked_options, read_options
from billhook.orchestrator.recipe_schema import recipe_schema

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples/recipes").glob("*.yaml"))


@pytest.fixture(scope="module")
def validator() -> Any:
    schema = recipe_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def test_there_is_one_for_each_of_the_commonest_jobs() -> None:
    assert {path.stem for path in EXAMPLES} == {"one-small-gpu", "one-big-gpu", "cpu", "cluster", "spot"}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_each_example_holds_to_the_schema_and_makes_a_plan(
    path: Path, validator: Any, shape_of_8b: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("billhook.orchestrator.planning.measured_rates", lambda model: DEVICES["cpu-core"].rates)
    text = path.read_text()
    content = yaml.safe_load(text)
    validator.validate(content)
    schema = re.match(r"# yaml-language-server: \$schema=(\S+)\n", text)
    assert schema is not None
    assert (path.parent / schema[1]).resolve() == ROOT / "docs/recipe.schema.json"
    assert f"--recipe examples/recipes/{path.name}" in text
    gpu = content.get("device") == "cuda"
    made = plan(shape_of_8b, recipe=path, assume_device="h100" if gpu else None)
    assert made.request.linears[-1]


@pytest.mark.parametrize(
    "content",
    [
        {"metod": "wanda"},
        {"method": "wandas"},
        {"method": "wanda+wanda"},
        {"pattern": 124},
        {"pattern": "2/4"},
        {"ram": "16"},
        {"options": {"dampin": 0.1}},
        {"options": {"damping": "much"}},
        {"allocation_options": {"spred": 0.1}},
        {"samples": 0},
        {"device": "tpu"},
        {"workers": "many"},
        {"keep_inputs": 0},
        {"include": [1]},
        {"trust_remote_code": "perhaps"},
    ],
    ids=str,
)
def test_the_schema_refuses_what_the_code_refuses(
    content: dict[str, Any], validator: Any, tmp_path: Path, shape_of_8b: Path
) -> None:
    assert not validator.is_valid(content)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(InputError):
        plan(shape_of_8b, recipe=tmp_path / "recipe.yaml")


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"method": "wanda+swaps+refit", "options": {"refit_steps": 3, "ridge": 0.2, "swaps": 1}},
        {"method": "auto", "methods": {"mlp": "wanda"}, "correction": 0.25},
        {"method": "sparsegpt", "pattern": "4:8", "options": {"damping": 0.1, "block": 64}},
        {"sparsity": None, "ram": "1.5 GiB", "vram": 2 << 30, "workers": 3, "keep_inputs": "never"},
        {"include": "q_proj", "exclude": ["a", "b"], "allocation": "owl", "allocation_options": {"spread": 0.1}},
    ],
    ids=str,
)
def test_the_schema_takes_what_the_code_takes(content: dict[str, Any], validator: Any, tmp_path: Path) -> None:
    validator.validate(content)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    recipe, _ = read_options(tmp_path / "recipe.yaml", {})
    checked_options("--set", recipe.method, method_named(recipe.method).options, recipe.options)


def test_the_schema_knows_every_key_and_every_option() -> None:
    properties = recipe_schema()["properties"]
    assert set(properties) == {*Recipe.model_fields, *Resources.model_fields} == set(RunOptions.__annotations__)
    assert all(each["description"] for each in properties.values())
    for name in [*METHODS, *(f"wanda+{refinement}" for refinement in REFINEMENTS)]:
        options = {field.name for field in dataclasses.fields(method_named(name).options)}
        assert options <= set(properties["options"]["properties"])


def test_an_option_has_one_name_everywhere() -> None:
    """But for the mappings, which the command line takes an entry at a time."""
    import typer

    group: Any = typer.main.get_command(app)
    flags = {name: parameter.opts for parameter in group.commands["prune"].params if (name := parameter.name)}
    for key in RunOptions.__annotations__:
        expected = SETTERS.get(key, f"--{key.replace('_', '-')}")
        assert flags[key] == [expected]
    assert set(SETTERS) == {"options", "allocation_options", "methods"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("metod: wanda", r"option 'metod' is unknown \(did you mean 'method'\?\)"),
        ("expert-token: 1", r"option 'expert_token' is unknown \(did you mean 'expert_tokens'\?\)"),
        (
            "{method: sparsegpt, options: {dampin: 1}}",
            r"--set dampin: sparsegpt has no such option \(did you mean 'damping'\?\)",
        ),
        ("{allocation: owl, allocation_options: {spred: 1}}", r"no such option \(did you mean 'spread'\?\)"),
        ("method: wandas", r"--method wandas: unknown \(did you mean 'wanda'\?\)"),
        ("method: wanda+refits", r"'refits' cannot follow a method \(did you mean 'refit'\?\)"),
        ("allocation: olw", r"nor an allocator \(did you mean 'owl'\?\)"),
        ("pattern: 2:4", r"option pattern: YAML reads N:M without quotes as a number"),
    ],
)
def test_what_does_not_exist_is_an_error_that_names_the_nearest(
    text: str, message: str, tmp_path: Path, shape_of_8b: Path
) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(InputError, match=message):
        plan(shape_of_8b, recipe=tmp_path / "recipe.yaml")
