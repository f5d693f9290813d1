"""What mkdocs does not do by itself: pages that lie outside docs/, links to files of the repository, the decisions.

Links in the repository's Markdown files are such that a git host follows them; here they are turned to the site's.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]

PAGES = {
    "README.md": "index.md",
    "benchmarks/README.md": "measuring.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
}
"""Pages of the site by their path in the repository, of those that are not in docs/."""

LINK = re.compile(r"\]\(([^)#:\s]+)(#[^)\s]*)?\)")


def on_config(config: MkDocsConfig) -> None:
    """List the decisions in their order."""
    decisions = [f"decisions/{path.name}" for path in sorted((ROOT / "docs/decisions").glob("*.md"))]
    config.nav = [{"Decisions": decisions} if each == {"Decisions": []} else each for each in config.nav or []]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages from outside docs/, and the files that any page links to."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    for page in [each for each in files if each.is_documentation_page()]:
        for target in _targets(page.src_uri, page.content_string):
            linked = f"source/{target}"
            if _site_path(target) == linked and linked not in files.src_uris:
                files.append(File.generated(config, linked, abs_src_path=str(ROOT / target)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links to files of the repository to where the site has them."""
    here = page.file.src_uri

    def turned(found: re.Match[str]) -> str:
        target = _resolved(here, found[1])
        if not (ROOT / target).is_file():
            return found[0]  # mkdocs says what is wrong with it
        return f"]({posixpath.relpath(_site_path(target), posixpath.dirname(here) or '.')}{found[2] or ''})"

    return LINK.sub(turned, markdown)


def _resolved(page: str, link: str) -> str:
    """Return a link's target as a path in the repository."""
    in_repository = {name: path for path, name in PAGES.items()}.get(page, f"docs/{page}")
    return posixpath.normpath(posixpath.join(posixpath.dirname(in_repository), link))


def _targets(page: str, markdown: str) -> list[str]:
    found = (_resolved(page, link[1]) for link in LINK.finditer(markdown))
    return [target for target in found if (ROOT / target).is_file()]


def _site_path(target: str) -> str:
    if target in PAGES:
        return PAGES[target]
    return target.removeprefix("docs/") if target.startswith("docs/") else f"source/{target}"
