"""The report in a real browser: what a reader sees, types and presses."""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from flashsae.report import comparison
from flashsae.report.render import render_report
from flashsae.train.failure import write_failure
from helpers.compared import write_compared

ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]


def unavailable(reason: str) -> None:
    """Skip, except in continuous integration, where a browser must be there."""
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


pytestmark = pytest.mark.xdist_group("browser")


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


class Watched:
    """A page with what it complained of and asked for."""

    def __init__(self, browser: Any) -> None:
        self.page = browser.new_page(viewport={"width": 1280, "height": 900}, reduced_motion="reduce")
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))


@pytest.fixture(scope="module")
def watched(browser: Any) -> Watched:
    return Watched(browser)


@pytest.fixture
def page(watched: Watched, report: Path) -> Iterator[Any]:
    """The open report, fresh; whatever the test did, nothing may have failed, run or been fetched."""
    watched.page.goto("about:blank")  # else an address with another # would not load it again
    watched.requests.clear()
    watched.page.goto(report.as_uri())
    yield watched.page
    assert watched.page.evaluate("window.pwned") is None
    assert watched.complaints == []
    assert {url.split("#")[0] for url in watched.requests} == {report.as_uri()}


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


def test_search_finds_latents_by_number(page: Any) -> None:
    for query, expected in [("#21", ["21"]), ("21", ["21"]), ("#2", ["20", "21"]), ("#7", ["7", "70"])]:
        page.fill("#query", query)
        assert shown(page) == expected, query


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


def test_cards_sort(page: Any) -> None:
    assert page.input_value("#sort") == "max"
    orders = {"density": ["20", "70", "7", "21"], "index": ["7", "20", "21", "70"], "max": ["20", "21", "7", "70"]}
    for key, expected in orders.items():
        page.select_option("#sort", key)
        assert shown(page) == expected, key


def test_payloads_are_shown_as_text(page: Any, payloads: list[str]) -> None:
    text = page.locator("#latent-70").inner_text()
    assert all(payload in text for payload in payloads)
    assert page.locator("#latent-70 img, #latent-70 script").count() == 0


def test_stronger_activations_have_stronger_shades(page: Any) -> None:
    weights = page.eval_on_selector_all(
        "#latent-20 .tokens + .example .act",
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


LATENTS_WITHOUT_A_CARD = {
    "#latent-0": ["Latent 0 has no card; 4 of the 96 latents have one", "was not active on the 20.5k tokens", "dead"],
    "#latent-9": [
        "Latent 9 has no card",
        "is active on about",
        "% of the 20.5k tokens",
        "At the end of training it was alive",
    ],
    "#latent-95": ["Latent 95 has no card"],
    "#latent-96": ["There is no latent 96: this SAE has the latents 0 to 95."],
    "#latent-123456789012345678901": ["There is no latent 123456789012345678901"],
    "#latent-<img src=x onerror='window.pwned=4'>": ["There is no latent"],
    "#latent-": ["There is no latent"],
}


def test_a_latent_without_a_card_is_spoken_of(page: Any, report: Path) -> None:
    from playwright.sync_api import expect

    assert not page.is_visible("#unshown")
    for fragment, expected in LATENTS_WITHOUT_A_CARD.items():
        page.evaluate("fragment => { location.hash = fragment; }", fragment)
        expect(page.locator("#unshown")).to_contain_text(expected[0])
        text = page.inner_text("#unshown")
        assert all(words in text for words in expected), (fragment, text)
        expect(page.locator("#unshown")).to_be_in_viewport()
    page.evaluate("location.hash = '#latent-20'")
    expect(page.locator("#unshown")).to_be_hidden()
    page.goto("about:blank")
    page.goto(f"{report.as_uri()}#latent-50")
    assert "Latent 50 has no card" in page.inner_text("#unshown")
    expect(page.locator("#unshown")).to_be_focused()


def test_the_density_of_a_latent_without_a_card_is_right(page: Any, report: Path) -> None:
    density = load_file(report.with_name("latents.safetensors"))["latent_density"]
    for number in (10, 33, 80):
        page.fill("#query", f"#{number}")
        (share,) = re.findall(r"on about ([\d.e-]+)%", page.inner_text("#unshown"))
        assert float(share) / 100 == pytest.approx(float(density[number]), rel=0.07)
    page.fill("#query", "#20")
    assert not page.is_visible("#unshown")


def test_numbers_are_reached_without_a_mouse(page: Any) -> None:
    """The value of each peak is text; figures say what they show; every control has a name."""
    assert page.inner_text("#latent-20 .tokens + .example .at").split() == ["training", "peak", "9.5"]
    named = "all => all.every(e => e.getAttribute('aria-label') || e.labels?.length || e.innerText.trim())"
    assert page.eval_on_selector_all("input, select, button, summary, a, [role=img], [role=group], dl.summary", named)
    headings = page.eval_on_selector_all("h1, h2, h3", "all => all.map(h => +h.tagName[1])")
    assert all(after <= before + 1 for before, after in pairwise(headings))


def test_page_fits_its_window_in_both_schemes(page: Any) -> None:
    page.evaluate("document.querySelector('.act').textContent = '='.repeat(500)")
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        for width in (320, 768, 1600):
            page.set_viewport_size({"width": width, "height": 800})
            assert page.evaluate("document.documentElement.scrollWidth") == width
        paper, ink = page.evaluate(
            "['backgroundColor', 'color'].map(name => +getComputedStyle(document.body)[name].match(/\\d+/)[0])"
        )
        assert (paper > 200 > 100 > ink) if scheme == "light" else (ink > 200 > 100 > paper)
    page.emulate_media(color_scheme="light")
    page.set_viewport_size({"width": 1280, "height": 900})


def test_the_comparison_is_sorted_by_any_column_light_and_dark(
    watched: Watched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("jinja2")
    monkeypatch.setattr(comparison, "pareto", lambda *_: "<svg></svg>")
    folders = [write_compared(tmp_path, f"k{k}", fvu, k=k) for k, fvu in ((4, 0.3), (32, None), (8, 0.04))]
    write_failure(folders[1], "<script>window.pwned=1</script>")
    for folder in folders:
        (folder / "report.html").touch()
    watched.page.goto(comparison.render_comparison(tmp_path, folders).as_uri())

    def names() -> list[str]:
        return [text.split()[0] for text in watched.page.locator("tbody th").all_inner_texts()[: len(folders)]]

    assert names() == ["k4", "k32", "k8"]
    for column, orders in (
        ("k", [["k4", "k8", "k32"], ["k32", "k8", "k4"]]),
        ("held-out FVU", [["k8", "k4", "k32"], ["k4", "k8", "k32"]]),  # what failed stays below
        ("SAE", [["k4", "k8", "k32"], ["k32", "k8", "k4"]]),
    ):
        for order, direction in zip(orders, ("ascending", "descending")):
            watched.page.get_by_role("button", name=column, exact=True).click()
            assert names() == order, column
            assert watched.page.locator(f"th[aria-sort={direction}]").count() == 1
    inks = []
    for scheme in ("light", "dark"):
        watched.page.emulate_media(color_scheme=scheme)
        inks.append(watched.page.evaluate("getComputedStyle(document.documentElement).getPropertyValue('--series-1')"))
    assert inks[0] != inks[1]
    watched.page.set_viewport_size({"width": 390, "height": 800})
    assert watched.page.evaluate("document.documentElement.scrollWidth") <= 390
    watched.page.set_viewport_size({"width": 1280, "height": 900})
    assert watched.page.evaluate("window.pwned") is None
    assert watched.complaints == []
