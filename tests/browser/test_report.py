"""The report as a browser shows it: wide and narrow, in the light and the dark."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from reports import hostile, interrupted, troubled

from billhook.orchestrator import report

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

DESKTOP, PHONE = (1440, 900), (390, 844)

IMAGE_BYTES = 400_000

CONTRAST = """() => {
  const light = (element, property) => {
    const [r, g, b] = getComputedStyle(element)[property].match(/\\d+/g).map((each) => {
      const c = each / 255;
      return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const both = [light(document.body, "color"), light(document.querySelector("section"), "backgroundColor")];
  return (Math.max(...both) + 0.05) / (Math.min(...both) + 0.05);
}"""
"""The contrast of text, as WCAG 2 has it."""


TOO_WIDE = """() => [...document.querySelectorAll("main *:not(.scroll, .scroll *, .plot *)")]
  .filter((element) => element.scrollWidth > element.clientWidth + 1 && getComputedStyle(element).display !== "inline")
  .map((element) => element.outerHTML.slice(0, 200))"""
"""The elements whose content is wider than they are, but for those that are scrolled and the inside of plots."""


def shown(browser: Browser, path: Path, size: tuple[int, int], scheme: Any) -> tuple[Page, list[str]]:
    """Open a report; return the page, once its plots are drawn, and what should not have been: grows as it happens."""
    page = browser.new_page(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme)
    amiss: list[str] = []
    page.on("console", lambda message: amiss.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: amiss.append(str(error)))
    page.on("dialog", lambda dialog: amiss.append(dialog.message))
    page.on("request", lambda asked: None if asked.url == path.as_uri() else amiss.append(asked.url))
    page.goto(path.as_uri())
    page.wait_for_selector(f"html[data-drawn={scheme}]", state="attached")
    return page, amiss


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE])
@pytest.mark.parametrize("state", ["finished", "interrupted", "troubled", "hostile"])
def test_it_is_shown_whole_and_asks_nobody(
    browser: Browser, out: Path, tmp_path: Path, state: str, size: tuple[int, int], scheme: str
) -> None:
    made = {"interrupted": interrupted, "troubled": troubled, "hostile": hostile}
    path = report(made[state](out, tmp_path / "run") if state in made else out, tmp_path / "report.html").path
    page, amiss = shown(browser, path, size, scheme)
    assert amiss == []
    assert "pruned" in page.title()
    assert page.evaluate("document.documentElement.scrollWidth") == size[0]
    assert page.evaluate(TOO_WIDE) == []
    plots = page.locator(".plot")
    assert plots.count() == 3
    for plot in plots.all():
        box = plot.bounding_box()
        assert box is not None
        assert box["width"] > 0.8 * size[0] or box["width"] > 900
        assert box["x"] + box["width"] <= size[0]
    assert page.locator("#plot-error .heatmaplayer image").count() == 1
    assert page.locator("#plot-time .barlayer .point path").count() > 0
    assert page.locator("script").count() == 3
    assert page.locator("img").count() == 0
    assert page.evaluate(CONTRAST) > 7
    page.close()


def test_names_are_seen_by_hovering(browser: Browser, out: Path) -> None:
    page, _ = shown(browser, report(out).path, DESKTOP, "light")
    heatmap = page.locator("#plot-error .heatmaplayer image")
    heatmap.scroll_into_view_if_needed()
    box = heatmap.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] * 0.9, box["y"] + box["height"] * 0.05)  # the last block's first linear
    page.wait_for_selector("#plot-error .hovertext")
    told = page.locator("#plot-error .hovertext").text_content()
    assert told is not None
    assert "model.layers.2.self_attn.q_proj.weight" in told
    assert "sparsity 0.5" in told
    page.close()


def test_a_table_is_sorted_and_filtered(browser: Browser, out: Path) -> None:
    page, _ = shown(browser, report(out).path, DESKTOP, "light")
    table = page.locator("#table-linears")
    column = table.locator("th").all_text_contents().index("error")

    def errors() -> list[float]:
        cells = table.locator(f"tbody tr td:nth-child({column + 1})").all_text_contents()
        return [float(text) for text in cells]

    unsorted = errors()
    assert len(unsorted) == 18
    table.locator("th button", has_text="error").click()
    assert errors() == sorted(unsorted, reverse=True)
    table.locator("th button", has_text="error").click()
    assert errors() == sorted(unsorted)
    page.locator("#filter-linears").fill("layers.1.mlp")
    assert table.locator("tbody tr td:first-child").all_text_contents() == [
        name for name in table.locator("tbody tr td:first-child").all_text_contents() if "layers.1.mlp" in name
    ]
    assert len(errors()) == 2
    page.close()


def test_plots_follow_when_it_gets_dark(browser: Browser, out: Path) -> None:
    page, amiss = shown(browser, report(out).path, DESKTOP, "light")
    text = page.locator("#plot-time .xtick text").first
    light = text.evaluate("element => getComputedStyle(element).fill")
    page.emulate_media(color_scheme="dark")
    page.wait_for_selector("html[data-drawn=dark]", state="attached")
    assert text.evaluate("element => getComputedStyle(element).fill") != light
    assert amiss == []
    page.close()


def test_a_notebook_can_show_it(browser: Browser, out: Path, tmp_path: Path) -> None:
    notebook = tmp_path / "notebook.html"
    notebook.write_text(f"<!doctype html><title>notebook</title>{report(out)._repr_html_()}")
    page = browser.new_page()
    amiss: list[str] = []
    page.on("console", lambda message: amiss.append(message.text))
    page.goto(notebook.as_uri())
    frame = page.frame_locator("iframe")
    frame.locator("html[data-drawn]").wait_for(state="attached")
    assert frame.locator("#plot-error .heatmaplayer image").count() == 1
    assert amiss == []
    page.close()


@pytest.mark.parametrize(("name", "size", "scheme"), [("desktop", DESKTOP, "light"), ("phone", PHONE, "dark")])
def test_screenshots_are_taken(
    browser: Browser,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    pytestconfig: pytest.Config,
    name: str,
    size: tuple[int, int],
    scheme: str,
) -> None:
    path = pytestconfig.getoption("--report") or report(request.getfixturevalue("out")).path
    page, _ = shown(browser, path.absolute(), size, scheme)
    image = (pytestconfig.getoption("--screenshots") or tmp_path) / f"report-{name}.png"
    height = page.locator("#linears, section:has(#table-linears)").bounding_box()
    assert height is not None
    page.screenshot(path=image, full_page=True, clip={"x": 0, "y": 0, "width": size[0], "height": height["y"]})
    assert 10_000 < image.stat().st_size < IMAGE_BYTES
    page.close()
