"""The shape of the house: packages, layers, and what must not be there."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = ["orchestrator", "cluster", "layerworkers", "kernels"]


def sources(layer: str) -> list[Path]:
    return sorted((ROOT / layer).rglob("*.py"))


def test_kernels_is_no_regular_package() -> None:
    """transformers probes and imports a top-level package called kernels: ours must not look like one."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "__init__.py").exists()


def test_every_folder_with_sources_is_packaged() -> None:
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    folders = {path.parent.relative_to(ROOT) for layer in LAYERS for path in sources(layer)}
    assert listed == {"billhook." + ".".join(folder.parts) for folder in folders}


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_imports_only_from_those_below(layer: str) -> None:
    allowed = LAYERS[LAYERS.index(layer) :]
    for path in sources(layer):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                assert node.level == 0, f"{path}: relative import"
                names = [node.module]
            for name in names:
                if name.startswith("billhook."):
                    assert name.split(".")[1] in allowed, f"{path} imports {name}"
                if name.split(".")[0] == "ray":
                    assert layer == "cluster", f"{path} imports ray"


def test_every_file_says_what_it_is_for() -> None:
    for layer in LAYERS:
        for path in sources(layer):
            assert ast.get_docstring(ast.parse(path.read_text())), f"{path} has no docstring"
