from html import unescape

import markdown_it
import pytest

from flashsae.publish.markdown import Raw, code, escaped, template
from flashsae.report.cards import printable

HOSTILE = [
    "<script>alert(1)</script>",
    "a|b|c",
    "![x](http://host/x.png)",
    "[x](javascript:alert(1))",
    "`code` ``more``",
    "*a* _b_ ~~c~~ **d** __e__",
    "line\n\n# heading\n---\n",
    "&lt;b&gt; $x$",
    "\\| \\",
    "```\nend of code",
]


def shown(markdown: str) -> str:
    """Return the text that a reader sees in the one cell of a table."""
    rendered = markdown_it.MarkdownIt("gfm-like", {"linkify": False}).render(f"| a |\n|---|\n| {markdown} |\n")
    (cell,) = rendered.split("<td>")[1:]
    return cell.split("</td>")[0]


@pytest.mark.parametrize("text", HOSTILE)
def test_nothing_from_outside_is_taken_for_markup(text: str) -> None:
    plain = shown(escaped(text))
    assert "<" not in plain
    assert unescape(plain) == printable(text).strip()
    inside = shown(code(text))
    assert (inside[:6], inside[-7:], inside.count("<")) == ("<code>", "</code>", 2)
    assert unescape(inside[6:-7]).strip() == printable(text).strip()


def test_what_is_markdown_stays() -> None:
    assert escaped(Raw("**a**")) == "**a**"
    assert escaped(0.5) == "0.5"


def test_a_template_escapes_by_itself() -> None:
    assert template("card.md.j2").environment.from_string("{{ a }} {{ a | raw }}").render(a="*") == "\\* *"
