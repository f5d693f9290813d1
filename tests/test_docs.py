"""The documentation is true: its commands run, its messages occur, what is made from the code is up to date."""

from __future__ import annotations

import ast
import io
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from conftest import MakeModel

from billhook.orchestrator import cli

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def workplace(
    ray_cluster: None, make_model: MakeModel, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """The folder that the pages speak of, in which ``model`` and ``text.txt`` lie; Ray runs already, to save time."""
    folder = tmp_path_factory.mktemp("workplace")
    (folder / "model").symlink_to(make_model())
    (folder / "text.txt").symlink_to(text_file)
    before = Path.cwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)


def billhook(line: str) -> str:
    """Run a command in this process, which has the libraries loaded; return what it printed."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", line.split())
        with pytest.raises(SystemExit) as stop:
            cli.main()
    assert not stop.value.code, f"{line}\n{err.getvalue()}"
    return out.getvalue()


def test_the_tutorial(workplace: Path) -> None:
    (workplace / "text.txt").unlink()  # the page makes its own
    setup, *rest = blocks(DOCS / "tutorial.md", "sh")
    assert "make setup" in setup
    said: dict[str, str] = {}
    for block in rest:
        shell = [line for line in block.splitlines() if not line.startswith("billhook ")]
        if shell:
            environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
            subprocess.run(["bash", "-e", "-c", "\n".join(shell)], check=True, env=environment)
        for line in block.splitlines():
            if line.startswith("billhook "):
                said[line.split()[1]] = billhook(line)
    assert "out: ok" in said["verify"]
    assert "perplexity" in said["eval"]
    (load,) = blocks(DOCS / "tutorial.md", "python")
    exec(compile(load, "tutorial.md", "exec"), {})


def test_the_page_on_python(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (workplace / "out").rename(workplace / "of-the-tutorial")
    for number, block in enumerate(blocks(DOCS / "how-to/notebook.md", "python")):
        exec(compile(block, f"notebook.md, block {number}", "exec"), {})
    said = capsys.readouterr().out
    assert "finished" in said
    assert "did you mean 'sparsegpt'" in said


def templates() -> Iterator[str]:
    """Every string of the source, with what is filled in replaced by a line feed."""
    for layer in ("orchestrator", "cluster", "layerworkers"):
        for path in (ROOT / layer).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    parts = [str(each.value) if isinstance(each, ast.Constant) else "\n" for each in node.values]
                    yield "".join(parts)
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield node.value


def test_every_message_among_the_troubles_is_one_that_the_code_has() -> None:
    known = list(templates())
    messages = blocks(DOCS / "troubles.md", "text")
    assert len(messages) > 20
    for message in messages:
        parts = [re.escape(part) for part in message.strip().split("…")]
        pattern = re.compile("(?:.|\n)*?".join(parts))
        assert any(pattern.search(each) for each in known), message


def test_what_is_made_from_the_code_is_up_to_date(tmp_path: Path) -> None:
    made = [sys.executable, str(DOCS / "make_reference.py"), str(tmp_path)]
    subprocess.run(made, check=True)
    pages = [path.relative_to(tmp_path) for path in tmp_path.rglob("*.*")]
    assert len(pages) == 4
    for page in pages:
        assert (DOCS / page).read_text() == (tmp_path / page).read_text(), f"{page}: run 'make docs'"
