"""Writes what docs/reference says of options, methods and recipes from the code itself; ``make docs`` runs it.

python docs/make_reference.py [FOLDER]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import typer

from billhook.layerworkers.methods import METHODS, REFINEMENTS
from billhook.orchestrator import cli
from billhook.orchestrator.allocation import ALLOCATORS
from billhook.orchestrator.recipe import Recipe, Resources
from billhook.orchestrator.recipe_schema import documented_options, recipe_schema

HEAD = "<!-- Made by docs/make_reference.py from the code; a test compares. -->\n"


def main(folder: Path) -> None:
    """Write all of them below ``folder``."""
    (folder / "reference").mkdir(exist_ok=True)
    for name, text in pages().items():
        (folder / name).write_text(text, encoding="utf-8")


def pages() -> dict[str, str]:
    """Return each file's text by its path below docs/."""
    return {
        "recipe.schema.json": json.dumps(recipe_schema(), indent=1) + "\n",
        "reference/recipe.md": _recipe(),
        "reference/commands.md": _commands(),
        "reference/methods.md": _methods(),
    }


def _recipe() -> str:
    schema = recipe_schema()["properties"]
    lines = [
        "# Options of a run",
        HEAD,
        "Each is a key of a [recipe](../cli.md#recipes), an option of `plan`, `prune` and `allocate`, and a keyword of",
        "the [functions](python.md) of these names, under the same name; on the command line with `--` and dashes.",
    ]
    for title, model in (
        ("What the bytes depend on", Recipe),
        ("What no byte depends on", Resources),
    ):
        lines += ["", f"## {title}", "", "| key | takes | default | meaning |", "|---|---|---|---|"]
        for name, field in model.model_fields.items():
            flag = f" (`{cli.SETTERS[name]} NAME=VALUE`)" if name in cli.SETTERS else ""
            default = schema[name].get("default")
            shown = "" if default in (None, [], {}) else f"`{json.dumps(default)}`"
            lines.append(f"| `{name}`{flag} | {_kind(name, schema[name])} | {shown} | {_cell(field.description)} |")
    return "\n".join(lines) + "\n"


def _kind(name: str, said: dict[str, Any]) -> str:
    if name == "method":
        return "a method, `+` refinements"
    if name == "allocation":
        return "an allocator, or a file"
    choices = said.get("anyOf", [said])
    kinds = []
    for each in choices:
        if "enum" in each:
            kinds += [f"`{word}`" for word in each["enum"]]
        elif "const" in each:
            kinds.append(f"`{each['const']}`")
        elif each.get("type") == "array":
            kinds.append("a list")
        elif each.get("type") == "object":
            kinds.append("a mapping")
        elif "minimum" in each and each["minimum"] == 1 << 20:
            kinds.append("bytes")
        elif each.get("pattern", "").startswith(r"^\s*\d+"):
            kinds.append("a size with its unit")
        elif each.get("type") != "null":
            kinds.append(
                {"integer": "an integer", "number": "a number", "boolean": "yes or no"}.get(each["type"], "text")
            )
    return ", ".join(dict.fromkeys(kinds))


def _commands() -> str:
    lines = ["# Commands", HEAD, "What `billhook COMMAND --help` says.", ""]
    group: Any = typer.main.get_command(cli.app)
    run_options = {*Recipe.model_fields, *Resources.model_fields}
    for name, command in group.commands.items():
        own = [each for each in command.params if each.name != "help"]
        if run_options <= {each.name for each in own}:
            own = [each for each in own if each.name not in run_options]
            rest = "Also takes all [options of a run](recipe.md)."
        else:
            rest = ""
        lines += [f"## billhook {name}", "", _cell(command.help), ""]
        if own:
            lines += ["| | | default |", "|---|---|---|"]
            lines += [f"| {_shown(each)} | {_cell(getattr(each, 'help', ''))} | {_default(each)} |" for each in own]
            lines.append("")
        if rest:
            lines += [rest, ""]
    return "\n".join(lines)


def _shown(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return f"`{parameter.metavar or parameter.name.upper()}`"
    return ", ".join(f"`{each}`" for each in parameter.opts)


def _default(parameter: Any) -> str:
    value = parameter.default
    return "" if value is None or value is False or callable(value) else f"`{value}`"


def _methods() -> str:
    lines = [
        "# Methods and allocators",
        HEAD,
        "What `billhook methods` says, with what each option is; formulas, costs and advice: [methods](../methods.md).",
    ]
    for title, given, table in (
        ("Methods", "`--method {}`", METHODS),
        ("Refinements", "`--method METHOD+{}`", REFINEMENTS),
        ("Allocators", "`--allocation {}`", ALLOCATORS),
    ):
        lines += ["", f"## {title}"]
        rows: dict[str, Any] = dict(table)
        for name, each in rows.items():
            source = f" Source: {each.source}." if each.source else ""
            lines += ["", f"### {name}", "", f"{given.format(name)}: {_sentence(each.summary)}{source}"]
            options = documented_options(each.options)
            if options:
                lines += ["", "| option | default | meaning |", "|---|---|---|"]
            for option, said in options.items():
                lines.append(f"| `{option}` | `{said['default']}` | {_cell(said.get('description'))} |")
    return "\n".join(lines) + "\n"


def _sentence(text: str) -> str:
    return text if text.endswith(".") else f"{text}."


def _cell(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
