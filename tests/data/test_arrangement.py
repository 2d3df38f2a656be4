"""Which hookpoints make an SAE."""

from __future__ import annotations

import pytest

from flashsae.data.arrangement import arrange, spread
from flashsae.errors import ConfigError

ONE, TWO, THREE, ALL = ("x",), ("in", "out"), ("a", "b", "c"), ()
HELD = ["h.0.mlp:in", "h.0.mlp", "h.1.mlp:in", "h.1.mlp", "h.10.mlp:in", "h.10.mlp", "h.0", "h.1"]


def saes(setting: str | None, sites: tuple[str, ...], held: list[str] = HELD) -> list[tuple[str, ...]]:
    made = arrange(None if setting is None else spread(setting, sites), held, sites)
    assert list(made) == [", ".join(names) for names in made.values()]
    return list(made.values())


def test_of_one_site_each_hookpoint_makes_an_sae() -> None:
    assert saes("h.*.mlp", ONE) == [("h.0.mlp",), ("h.1.mlp",), ("h.10.mlp",)]
    assert saes("h.{10,1}.mlp, h.0.mlp:in,h.1.*", ONE) == [("h.1.mlp",), ("h.10.mlp",), ("h.0.mlp:in",)]
    assert saes(None, ONE, HELD[:2]) == [("h.0.mlp:in",), ("h.0.mlp",)]


def test_of_two_sites_a_module_stands_for_its_input_and_output() -> None:
    assert spread("h.0.mlp", TWO) == "h.0.mlp:in, h.0.mlp"
    assert saes("h.0.mlp", TWO) == [("h.0.mlp:in", "h.0.mlp")]
    assert saes("h.{0,10}.mlp", TWO) == [("h.0.mlp:in", "h.0.mlp"), ("h.10.mlp:in", "h.10.mlp")]
    assert saes("h.0.mlp:in,h.1.mlp:out", TWO) == [("h.0.mlp:in", "h.1.mlp")]
    assert saes("h.1,h.0", TWO) == [("h.1", "h.0")]
    assert saes("transformer.h.0.mlp", TWO) == [("h.0.mlp:in", "h.0.mlp")]
    assert saes("h.*.mlp:in, h.*.mlp", TWO) == saes(None, TWO) == saes("h.*.mlp", TWO)
    assert saes("h.0,h.1,h.1.mlp", THREE) == [("h.0", "h.1", "h.1.mlp")]


def test_where_an_sae_takes_all_that_there_are_they_make_one() -> None:
    assert saes("h.{1,0}", ALL) == [("h.0", "h.1")]
    assert saes("h.1, h.0, h.*", ALL) == [("h.1", "h.0")]
    assert saes(None, ALL, ["h.9", "h.3"]) == [("h.9", "h.3")]


@pytest.mark.parametrize(
    ("setting", "sites", "held", "message"),
    [
        ("h.0.mlp:in", TWO, HELD, r"expected 2, of in and out in this order, got 1 \(h\.0\.mlp:in\)\. Name a module"),
        ("h.0.mlp:out", TWO, HELD, "expected 2, of in and out"),
        ("h.0,h.1,h.0.mlp", TWO, HELD, r"got 3 \(h\.0,h\.1,h\.0\.mlp\)"),
        ("h.0", THREE, HELD, r"expected 3, of a and b and c in this order, got 1 \(h\.0\)\. Name each: --hookpoint A"),
        ("h.*.mlp:in, h.{0,1}", TWO, HELD, r"equally many hookpoints, got 3 \(h\.0\.mlp:in, .*\) and 2 \(h\.0, h\.1\)"),
        ("h.0, h.0", TWO, HELD, "expected 2 different ones, got h.0, h.0"),
        ("h.0", ALL, HELD, r"expected two or more different ones, got h\.0\."),
        (None, ALL, ["h.0"], r"expected two or more different ones, got h\.0\."),
        (None, TWO, ["h.0", "h.1"], "none of the held h.0, h.1 say which is which. Name them"),
        (None, THREE, HELD, "expected 3, of a and b and c in this order"),
        ("h.0,", ONE, HELD, "expected a module path on both sides of each comma, got 'h.0,'"),
        (",", TWO, HELD, "expected a module path on both sides of each comma"),
        ("h.{0,1", ONE, HELD, r"braces in pairs, such as h\.\{1,3\}, got 'h\.\{0'"),
        ("h.0}", ONE, HELD, "braces in pairs"),
        ("h.{0{1}}", ONE, HELD, "braces in pairs"),
        ("h.{0,1}.mlp:inn", TWO, HELD, "expected 2, of in and out"),
    ],
)
def test_what_makes_no_whole_sae_is_refused(
    setting: str | None, sites: tuple[str, ...], held: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=f"^hookpoint: .*{message}"):
        saes(setting, sites, held)


def test_what_a_cache_lacks_keeps_its_name() -> None:
    assert saes("h.{0,7}", ONE) == [("h.0",), ("h.7",)]  # of which the cache tells that it has it not
    assert saes("h.0.attn", TWO) == [("h.0.attn:in", "h.0.attn")]
