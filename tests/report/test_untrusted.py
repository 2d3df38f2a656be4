"""What comes from data and settings is text in the report, and tells nothing of the machine."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from flashsae.report.render import render_report
from flashsae.report.snippets import LatentSnippets, Snippet, Snippets, write_snippets
from helpers.page import Page


def test_report_needs_no_network(run: Path) -> None:
    page = Page(render_report(run).read_text("utf-8"))
    for tag, attrs in page.elements:
        assert tag not in {"link", "img", "iframe", "object", "embed", "image"}, tag
        for name in ("src", "href", "xlink:href", "action", "srcset"):
            assert (attrs.get(name) or "#").startswith("#")
    text = (run / "report.html").read_text("utf-8")
    assert set(re.findall(r"https?://[^\"' <)]+", text)) == {"http://www.w3.org/1999/xlink"}
    assert "@import" not in text
    assert len(text) < 3_000_000


def test_text_of_the_data_set_is_never_markup(run: Path, payloads: list[str]) -> None:
    text = render_report(run).read_text("utf-8")
    page = Page(text)
    assert page.count("script") == 1
    assert page.count("img") == page.count("b") == 0
    assert all(payload in page.text for payload in payloads)
    assert "\u2028" not in text
    assert "<!--" not in text
    assert not [name for _, attrs in page.elements for name in attrs if name.startswith("on")]


@pytest.mark.usefixtures("without_figures")
def test_only_the_script_of_the_report_may_run(run: Path) -> None:
    import base64
    import hashlib

    text = render_report(run).read_text("utf-8")
    (script,) = re.findall(r"<script>(.*?)</script>", text, flags=re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = [a["content"] for _, a in Page(text).elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy


HOSTILE = "</script><img src=x onerror=alert(1)>\"'&amp;<!--"


def test_every_string_is_text_wherever_it_comes_from(run: Path, render: Callable[[Path], Page]) -> None:
    import tomli_w

    settings = dict.fromkeys(("model", "hookpoint", "dataset", "flashsae_version", HOSTILE), HOSTILE)
    settings |= {  # type: ignore[assignment]
        "logger": [HOSTILE],
        "section": {HOSTILE: HOSTILE},
    }
    (run / "config.toml").write_text(tomli_w.dumps(settings), "utf-8")
    hostile = LatentSnippets(3, 0.5, 8.0, 2.5, [HOSTILE], [2], [Snippet([HOSTILE] * 2, [0.0, 4.0], 1, "train")])
    write_snippets(run / "snippets.json", Snippets(4, [hostile], 0))
    page = render(run)
    assert page.count("img") == 0
    assert page.count("script") == 1
    assert page.text.count(HOSTILE) >= 9
    assert not [name for _, attrs in page.elements for name in attrs if name.startswith("on")]


PLACES = {
    "/home/alice/models/pythia": "pythia",
    "/home/alice/data/": "data",
    "~/texts/a.jsonl": "a.jsonl",
    "~alice/texts": "texts",
    "../../alice/x.txt": "x.txt",
    "C:\\Users\\alice\\run": "run",
    "\\\\server\\alice\\x": "x",
    "file:///home/alice/m": "m",
    "/": "a folder",
    "EleutherAI/pythia-160m": "EleutherAI/pythia-160m",
    "data/texts.jsonl": "data/texts.jsonl",
}


@pytest.mark.parametrize("place", PLACES)
def test_no_setting_tells_of_the_machine(run: Path, render: Callable[[Path], Page], place: str) -> None:
    import tomli_w

    settings = dict.fromkeys(("model", "dataset", "activations"), place) | {"hookpoint": "h.3", "logger": [place]}
    (run / "config.toml").write_text(tomli_w.dumps(settings), "utf-8")
    page = render(run)
    text = (run / "report.html").read_text("utf-8")
    assert page.text.count(PLACES[place]) >= 4
    assert "alice" not in text
    assert str(run.parent) not in text
