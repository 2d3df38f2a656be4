"""The report in a real browser: what a reader sees, types and presses."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flashsae.report.render import render_report

ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]


def unavailable(reason: str) -> None:
    """Skip, except in continuous integration, where a browser must be there."""
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    names = ("chromium", "google-chrome", "chromium-browser")
    executable = next(filter(None, map(shutil.which, names)), None)
    if executable is None:
        unavailable(f"no browser is installed: looked for {', '.join(names)}")
    try:
        from playwright.sync_api import sync_playwright
    except ModuleNotFoundError:
        unavailable("playwright is not installed")
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=executable, args=ARGUMENTS)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, make_run: Callable[[Path], Path]) -> Path:
    return render_report(make_run(tmp_path_factory.mktemp("browser") / "run"))


@pytest.fixture
def page(browser: Any, report: Path) -> Iterator[Any]:
    """The open report; whatever the test did, nothing may have failed, run or been fetched."""
    opened = browser.new_page(viewport={"width": 1280, "height": 900})
    requests: list[str] = []
    complaints: list[str] = []
    opened.on("request", lambda request: requests.append(request.url))
    opened.on("console", lambda message: complaints.append(message.text))
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.goto(report.as_uri())
    yield opened
    assert opened.evaluate("window.pwned") is None
    assert complaints == []
    assert {url.split("#")[0] for url in requests} == {report.as_uri()}
    opened.close()


def shown(page: Any) -> list[str]:
    return page.eval_on_selector_all(
        ".card", "cards => cards.filter(c => c.offsetParent !== null).map(c => c.dataset.index)"
    )


def test_figures_and_cards_are_visible(page: Any) -> None:
    assert page.locator("h1").inner_text().startswith("org/tiny-model")
    boxes = page.eval_on_selector_all(".plot svg", "all => all.map(svg => svg.getBoundingClientRect().height)")
    assert len(boxes) == 9
    assert min(boxes) > 100
    assert len(shown(page)) == 4


def test_search_filters_by_text_and_counts(page: Any) -> None:
    page.fill("#query", "Lake")
    assert shown(page) == ["21", "7"]
    assert page.inner_text("#count") == "2 of 4 latents"
    assert page.evaluate("[...CSS.highlights.get('found')].map(String)") == ["lake"] * 5


def test_search_finds_text_across_tokens_and_opens_what_is_folded(page: Any) -> None:
    details = page.locator("#latent-7 details")
    page.fill("#query", "estuary of est")
    assert shown(page) == ["7"]
    assert details.evaluate("node => node.open")
    assert page.evaluate("[...CSS.highlights.get('found')].map(String)") == ["estuary of est"]
    page.fill("#query", "")
    assert not details.evaluate("node => node.open")


@pytest.mark.parametrize(
    ("query", "expected"), [("#21", ["21"]), ("20", ["20"]), ("#2", ["20", "21"]), ("#7", ["7", "70"])]
)
def test_search_finds_latents_by_number(page: Any, query: str, expected: list[str]) -> None:
    page.fill("#query", query)
    assert shown(page) == expected


def test_search_without_a_match_offers_to_clear(page: Any) -> None:
    assert not page.is_visible("#empty")
    page.fill("#query", "<i>zebra</i>")
    assert shown(page) == []
    assert page.is_visible("#empty")
    assert "<i>zebra</i>" in page.inner_text("#empty")
    assert page.inner_text("#count") == "0 of 4 latents"
    page.click("#clear")
    assert len(shown(page)) == 4
    assert not page.is_visible("#empty")
    assert page.inner_text("#count") == "4 latents"


def test_keyboard_reaches_and_leaves_the_search(page: Any) -> None:
    page.keyboard.press("/")
    page.keyboard.type("violin")
    assert page.input_value("#query") == "violin"
    assert shown(page) == ["20"]
    page.keyboard.type("/")
    assert page.input_value("#query") == "violin/"
    page.keyboard.press("Escape")
    assert page.input_value("#query") == ""
    assert len(shown(page)) == 4


@pytest.mark.parametrize(
    ("key", "expected"),
    [("density", ["20", "70", "7", "21"]), ("max", ["20", "21", "7", "70"]), ("index", ["7", "20", "21", "70"])],
)
def test_cards_sort(page: Any, key: str, expected: list[str]) -> None:
    page.select_option("#sort", "index" if key != "index" else "max")
    page.select_option("#sort", key)
    assert shown(page) == expected


def test_payloads_are_shown_as_text(page: Any, payloads: list[str]) -> None:
    text = page.locator("#latent-70").inner_text()
    assert all(payload in text for payload in payloads)
    assert page.locator("#latent-70 img, #latent-70 script").count() == 0


def test_stronger_activations_have_stronger_shades(page: Any) -> None:
    weights = page.eval_on_selector_all(
        "#latent-20 .text:first-of-type .act",
        "acts => acts.map(a => +getComputedStyle(a).backgroundColor.match(/[\\d.]+(?=\\)$)/)[0])",
    )
    assert weights[0] > 2 * weights[1] > 0
    assert page.locator("#latent-20 .act").first.get_attribute("title") == "9.5"


def test_a_dot_on_the_map_leads_to_its_card_even_if_hidden(page: Any) -> None:
    from playwright.sync_api import expect

    page.fill("#query", "violin")
    page.click("#figure-map a[href='#latent-70']")
    expect(page.locator("#latent-70")).to_be_in_viewport()
    assert page.input_value("#query") == ""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 768, 1600])
def test_page_fits_its_window_in_both_schemes(browser: Any, report: Path, scheme: str, width: int) -> None:
    context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 800})
    page = context.new_page()
    page.goto(report.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") == width
    paper, ink = page.evaluate(
        "['backgroundColor', 'color'].map(name => +getComputedStyle(document.body)[name].match(/\\d+/)[0])"
    )
    assert (paper > 200 > 100 > ink) if scheme == "light" else (ink > 200 > 100 > paper)
    context.close()
