"""The JSON schema of recipe files, for editors: made from the keys of a run and the tables of methods.

``docs/recipe.schema.json`` is what ``billhook schema`` prints; a test compares.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ByteSize, ConfigDict, TypeAdapter

from billhook.layerworkers.methods import METHODS, REFINEMENTS
from billhook.orchestrator.allocation import ALLOCATORS
from billhook.orchestrator.recipe import SIZE_WITH_UNIT, Recipe, Resources

_SIZE = {
    "anyOf": [
        {"type": "string", "pattern": f"^{SIZE_WITH_UNIT}$"},
        {"type": "integer", "minimum": 1 << 20},
        {"type": "null"},
    ]
}


def recipe_schema() -> dict[str, Any]:
    """Return the JSON schema (draft 2020-12) of a recipe file, the methods of other packages included.

    A file that holds to it has keys and values that are known; whether they go together, ``billhook plan`` says.
    """
    properties = {**_properties(Recipe), **_properties(Resources)}
    first, others = "|".join(METHODS), "|".join(REFINEMENTS)
    properties["method"]["anyOf"] = [
        {"enum": list(METHODS)},
        {"type": "string", "pattern": f"^({first})(\\+({others}))*$"},
    ]
    properties["pattern"]["pattern"] = r"^(unstructured|\d+:\d+)$"
    properties["allocation"]["anyOf"] = [{"enum": list(ALLOCATORS)}, {"type": "string"}]
    for key in ("method", "allocation"):
        del properties[key]["type"]
    solvers = {name: each.options for name, each in METHODS.items()}
    solvers |= {name: each.options for name, each in REFINEMENTS.items()}
    for key, owners in (
        ("options", solvers),
        ("allocation_options", {name: each.options for name, each in ALLOCATORS.items()}),
    ):
        properties[key] |= {"properties": _options(owners), "additionalProperties": False}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "billhook recipe",
        "description": "Options of billhook plan, prune and allocate, for --recipe.",
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
    }


def documented_options(kind: type[Any]) -> dict[str, dict[str, Any]]:
    """Return what is said of each option of a method or allocator: type, default, description.

    kind: the frozen dataclass of its options; the descriptions are the fields' own docstrings.
    """
    # A dataclass takes no configuration from outside; a list of it passes its own on.
    schema = TypeAdapter(list[kind], config=ConfigDict(use_attribute_docstrings=True)).json_schema()  # type: ignore[valid-type]
    (documented,) = schema["$defs"].values()
    return {
        name: {key: value for key, value in said.items() if key != "title"}
        for name, said in documented.get("properties", {}).items()
    }


def _properties(model: type[BaseModel]) -> dict[str, dict[str, Any]]:
    """Return the schema of each key, as the recipe's validators take it."""
    found: dict[str, dict[str, Any]] = {}
    for name, said in model.model_json_schema()["properties"].items():
        annotation = model.model_fields[name].annotation
        schema = {key: value for key, value in said.items() if key not in ("title", "format")}
        if annotation == ByteSize | None:
            schema |= _SIZE
        elif schema.get("type") == "array":  # one needs no list around it
            del schema["type"]
            items = schema.pop("items")
            schema["anyOf"] = [{"type": "array", "items": items}, {"type": "string"}]
        found[name] = schema
    return found


def _options(owners: Mapping[str, type[Any]]) -> dict[str, dict[str, Any]]:
    """Return the schema of every option that any of the owners has, and whose it is.

    An option that several have can mean something else in each: the description gives all.
    """
    found: dict[str, dict[str, Any]] = {}
    for owner, kind in owners.items():
        for name, said in documented_options(kind).items():
            known = found.setdefault(name, {"type": said["type"], "description": ""})
            if said["type"] != known["type"]:
                known["type"] = "number"
            line = f"{owner}, default {said['default']}: {said.get('description', '')}"
            known["description"] += f"\n{line}" if known["description"] else line
    return found
