"""Debian's Chromium, and reports to look at in it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from billhook.orchestrator import prune

if TYPE_CHECKING:
    from playwright.sync_api import Browser


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--screenshots", type=Path, help="keep the screenshots in this folder")
    parser.addoption("--report", type=Path, help="take them of this report rather than of a tiny run's")


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    found = shutil.which("chromium")
    if found is None:
        pytest.fail("no chromium: install it, on Debian with 'apt-get install chromium'")
    # As root, Chromium does not start in a sandbox.
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=arguments)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def out(llama: Path, text_file: Path, ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prune(
        llama, tmp_path_factory.mktemp("browser") / "out", method="wanda", sparsity=0.5, calibration=str(text_file),
        samples=4, seqlen=32, exclude=("down_proj",), workers=1,
    ).output  # fmt: skip
