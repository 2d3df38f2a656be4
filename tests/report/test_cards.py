import base64
from typing import Any

import numpy as np
import pytest

from flashsae.report.cards import card, density_text, known_of_all, printable, sample_text
from flashsae.report.snippet_file import LatentSnippets, Snippet, Snippets

FAMILY = "👩\u200d💻"


def latent(*snippets: Snippet, max_act: float = 8.0, **fields: Any) -> LatentSnippets:
    return LatentSnippets(
        **{"index": 3, "density": 0.5, "mean_act": 1.0, "top_tokens": [], "histogram": [1]} | fields,
        max_act=max_act,
        snippets=list(snippets),
    )


def segments(tokens: list[str], acts: list[float], peak: int = 0, max_act: float = 8.0) -> list[tuple[str, str]]:
    shown = card(latent(Snippet(tokens, acts, peak), max_act=max_act))
    return [(part["text"], part["value"]) for part in shown["snippets"][0]["segments"]]


def test_tokens_that_make_up_a_character_are_one_piece() -> None:
    assert segments(["a ", "", "", "日", "b"], [0.0, 0.0, 4.0, 1.0, 0.0]) == [
        ("a ", ""),
        ("日", "0, 4, 1 on the 3 tokens of this character"),
        ("b", ""),
    ]
    assert segments(["", "é"], [0.0, 0.0]) == [("é", "")]
    (example,) = card(latent(Snippet(["", "é", "f"], [2.0, 0.0, 1.0], 0)))["snippets"]
    assert [(part["text"], part["peak"]) for part in example["segments"]] == [("é", True), ("f", False)]
    assert example["peak"] == "2"


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        (" ", "␣"),
        ("    ", "␣␣␣␣"),
        ("\t", "⇥"),
        ("\n\n", "↵↵"),
        (" \n", "␣↵"),
        ("\x00", "␀"),
        ("\x1b", "␛"),
        ("\x7f", "␡"),
        ("\u200b", "⟨U+200B⟩"),
        ("\u200d", "⟨U+200D⟩"),
        ("\ufe0f", "⟨U+FE0F⟩"),
        ("\ufeff", "⟨U+FEFF⟩"),
        ("\u00a0", "⟨U+00A0⟩"),
        ("\u202e", "⟨U+202E⟩"),
        ("\ud800", "⟨U+D800⟩"),
        ("", "∅"),
        ("\u0301", "\u0301"),
        (FAMILY, FAMILY),
        ("שלום", "שלום"),
        ("x" * 500, "x" * 500),
    ],
)
def test_whatever_fires_can_be_seen(token: str, shown: str) -> None:
    assert segments([token], [1.0]) == [(shown, "1")]


def test_leading_spaces_are_not_shaded_and_quiet_text_is_left_alone() -> None:
    assert segments(["a", "  b", f" {FAMILY}", "\u200c", " "], [0.0, 1.0, 0.0, 0.0, 0.0]) == [
        ("a  ", ""),
        ("b", "1"),
        (f" {FAMILY}\u200c ", ""),
    ]


def test_a_text_does_not_begin_with_the_space_of_its_first_word() -> None:
    assert segments([" of", " it"], [0.0, 1.0]) == [("of ", ""), ("it", "1")]
    assert segments([" of", " it"], [1.0, 0.0]) == [("of", "1"), (" it", "")]
    assert segments([" ", " it"], [1.0, 0.0]) == [("␣", "1"), (" it", "")]


def test_listed_tokens_can_be_seen_and_are_not_endless() -> None:
    shown = card(latent(top_tokens=[" ", "\u200b", "y", "=" * 1000]))["top_tokens"]
    assert shown[:3] == ["␣", "⟨U+200B⟩", "y"]
    assert shown[3] == f"{'=' * 60}… (1,000 characters)"


@pytest.mark.parametrize("max_act", [0.0, float("inf"), float("nan"), 1e38])
def test_odd_scales_give_finite_shades(max_act: float) -> None:
    act = max_act if max_act == float("inf") else 1e38
    (example,) = card(latent(Snippet(["a"], [act], 0), max_act=max_act))["snippets"]
    assert 0.0 <= example["segments"][0]["weight"] <= 1.0


def test_printable_text_keeps_letters_and_marks_what_would_break_a_line() -> None:
    assert printable("é 日本 🙂 \u0627\u0644") == "é 日本 🙂 \u0627\u0644"
    assert printable("a\nb\tc") == "a↵ b c"
    assert printable("\x00\x1b\u202e\u2028\ud800") == "␀␛⟨U+202E⟩⟨U+2028⟩⟨U+D800⟩"


def test_densities_have_two_figures() -> None:
    values = [0.0, 1e-7, 0.0000961, 0.0024, 0.125, 0.9999, 1.0]
    assert [density_text(value) for value in values] == ["0%", "1.0e-05%", "0.0096%", "0.24%", "12%", "100%", "100%"]


@pytest.mark.parametrize("d_sae", [1, 9, 300])
def test_what_is_known_of_every_latent_can_be_unpacked(d_sae: int) -> None:
    density = 10 ** np.random.default_rng(0).uniform(-5, 0, d_sae)
    density[::4] = 0.0
    dead = np.arange(d_sae) % 8 == 0
    known = known_of_all({"latent_density": density, "is_dead": dead.astype(float)}, Snippets(150_000, [], 7))
    levels = np.frombuffer(base64.b64decode(known["density"]), np.uint8)
    unpacked = np.where(levels > 0, 10 ** (known["low"] + (levels.astype(float) - 1) * known["step"]), 0.0)
    np.testing.assert_allclose(unpacked, density, rtol=0.03)
    bits = np.unpackbits(np.frombuffer(base64.b64decode(known["dead"]), np.uint8), bitorder="little")
    assert (bits[:d_sae] == dead).all()
    assert known["sample"] == "the 150k tokens of the sample"


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf"), 1.0, -1.0])
def test_odd_densities_can_be_packed(value: float) -> None:
    known = known_of_all({"latent_density": np.full(5, value)}, None)
    expected = 1 if value == 1.0 else 0
    assert set(base64.b64decode(known["density"])) == {expected}
    assert known["dead"] == ""


def of_splits(*splits: Any, held_out: int | None = 30) -> str:
    return sample_text(Snippets(100, [latent(*(Snippet(["a"], [1.0], 0, split) for split in splits))], held_out))


def test_the_lead_says_what_the_texts_are_from() -> None:
    assert of_splits("held_out", "held_out", held_out=100).startswith(
        "All of them are held out, and so is every text below"
    )
    assert of_splits("held_out").startswith("30 of them are held out, and so is every text below")
    mixed = of_splits("held_out", "train", "train")
    assert "30 of them are held out, too few for all examples: 1 of the 3 texts" in mixed
    assert "2, marked “training”" in mixed
    assert "was not written down" in of_splits(None, held_out=None)


def test_a_value_below_zero_fires_and_is_shaded_by_its_size() -> None:
    shown = card(latent(Snippet(["a", " b", " c"], [0.0, -4.0, 2.0], 1), max_act=-8.0))
    (example,) = shown["snippets"]
    assert [(part["text"], part["value"], part["weight"], part["minus"]) for part in example["segments"]] == [
        ("a ", "", 0.0, False),
        ("b", "-4", 0.5, True),
        (" ", "", 0.0, False),
        ("c", "2", 0.25, False),
    ]
    assert (shown["max"], shown["max_act"], shown["ends"], shown["has_minus"]) == (8.0, "-8", ["-8", "0"], True)
