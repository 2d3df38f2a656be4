"""Mixtures hold the shares of characters that were asked for, at every place, and go on at any place."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import pytest

from flashsae.errors import ConfigError, DataError
from flashsae.text.content import Tokens
from flashsae.text.mixture import Mixture, mixed
from flashsae.text.open import open_text


def texts(letter: str, n: int, longest: int, seed: int = 0) -> list[str]:
    lengths = random.Random(seed)
    return [letter * lengths.randint(1, longest) for _ in range(n)]


LONG, SHORT, MIDDLE = texts("a", 400, 90), texts("b", 3000, 7), texts("c", 500, 30)


@pytest.mark.parametrize("weights", [(0.7, 0.3), (1, 9), (50, 1)])
def test_shares_are_held_at_every_place(weights: tuple[float, float]) -> None:
    text = mixed([(open_text(LONG), weights[0]), (open_text(SHORT), weights[1])])
    read = {"a": 0, "b": 0}
    for content in itertools.islice(text.documents(), 2000):
        assert isinstance(content, str)
        read[content[0]] += len(content)
        total = sum(read.values())
        assert abs(read["a"] - total * weights[0] / sum(weights)) <= 90


def test_reading_goes_on_at_any_place_with_the_same_documents() -> None:
    text = mixed([(open_text(LONG), 2), (open_text(["", *SHORT]), 1), (open_text(MIDDLE), 1)])
    whole = list(text.placed())
    for start in (0, 1, 7, 500, len(whole), 10**6):
        assert list(text.placed(start)) == [row for row in whole if row[0] >= start]


def test_a_text_that_ends_begins_again_until_each_was_read_once() -> None:
    text = mixed([(open_text(LONG), 1), (open_text(["b" * 50, "B" * 50]), 1)])
    documents = list(text.documents())
    assert sorted(d for d in documents if d[0] == "a") == sorted(LONG)  # type: ignore[index]
    again = [d for d in documents if d[0] != "a"]  # type: ignore[index]
    assert again == list(itertools.islice(itertools.cycle(["b" * 50, "B" * 50]), len(again)))
    assert len(again) * 50 == pytest.approx(sum(map(len, LONG)), rel=0.01)


def test_numbers_stay_whatever_the_weights_are() -> None:
    numbers = []
    for weights in ((1, 1), (9, 1)):
        text = mixed([(open_text(LONG), weights[0]), (open_text(SHORT), weights[1])])
        found = dict(text.numbered())
        numbers.append(found)
        assert all(found[2 * i] == document for i, document in enumerate(LONG))
        assert all(found[2 * i + 1] == document for i, document in enumerate(SHORT))
    assert numbers[0] == numbers[1]


def test_tokens_count_four_characters_each() -> None:
    text = mixed([(open_text([[1] * 10] * 50), 1), (open_text(["b" * 10] * 200), 1)])
    kinds = [isinstance(content, Tokens) for content in itertools.islice(text.documents(), 100)]
    assert sum(kinds) == 20


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text("".join(f'{{"text": "{name}{i}", "x": "{name}"}}\n' for i in range(99)))
    (tmp_path / "c.txt").write_text("c0\n\nc1")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("dataset", "weights"),
    [
        ("a.jsonl@0.7, b.jsonl@0.3", (0.7, 0.3)),
        ("a.jsonl@7,b.jsonl@3", (7, 3)),
        ("a.jsonl,b.jsonl", (1, 1)),
        ("a.jsonl@.5,b.jsonl", (0.5, 1)),
        ("[a,b].jsonl@1e-1, c.txt@2., b.jsonl", (0.1, 2, 1)),
    ],
)
def test_names_carry_weights(folder: Path, dataset: str, weights: tuple[float, ...]) -> None:
    text = open_text(dataset)
    assert isinstance(text, Mixture)
    assert text.weights == weights
    assert text.name.startswith("a mixture by characters of ")


def test_a_name_tells_shares_and_parts(folder: Path) -> None:
    name = open_text("a.jsonl@2, b.jsonl@1").name
    assert f"66.667% {folder / 'a.jsonl'} (1 file, " in name
    assert f" and 33.333% {folder / 'b.jsonl'} (1 file, " in name


def test_a_file_may_be_called_like_a_mixture(folder: Path) -> None:
    for name in ("a,b.jsonl", "d@0.5", "e@2.txt"):
        (folder / name).write_text('{"text": "odd"}' if "json" in name else "odd")
    assert list(open_text("a,b.jsonl").documents()) == ["odd"]
    assert list(open_text("e@2.txt").documents()) == ["odd"]
    with pytest.raises(DataError, match="cannot read a"):
        open_text("d@0.5")
    assert open_text("a.jsonl@0.3").name == open_text("a.jsonl").name  # the only part has all


def test_many_names_are_longer_than_one_may_be(folder: Path) -> None:
    names = [f"{'x' * 60}{i}.txt" for i in range(9)]
    for name in names:
        (folder / name).write_text(f"{name}\n\nmore")
    text = open_text(", ".join(names))
    assert isinstance(text, Mixture)
    assert len(text.parts) == 9
    with pytest.raises(ConfigError, match="dataset: File name too long"):
        open_text("x" * 300)


def test_fingerprints_tell_weights_and_parts_apart(folder: Path) -> None:
    same = {open_text(name).fingerprint for name in ("a.jsonl@1,b.jsonl@3", "a.jsonl@2, b.jsonl@6")}
    others = {open_text(name).fingerprint for name in ("a.jsonl@3,b.jsonl@1", "b.jsonl@1,a.jsonl@3", "a.jsonl,c.txt")}
    assert len(same) == 1
    assert len(others | same) == 4


def test_the_same_documents_twice_are_refused(folder: Path) -> None:
    (folder / "other.jsonl").write_bytes((folder / "a.jsonl").read_bytes())
    for name in ("a.jsonl, c.txt, a.jsonl@2", "a.jsonl, ./a.jsonl", "a.jsonl@1, other.jsonl@2"):
        with pytest.raises(DataError, match=r"^dataset: .* the same documents as .*a\.jsonl .* both parts of .* split"):
            assert open_text(name).fingerprint


def test_settings_hold_for_the_parts_that_have_such_a_thing(folder: Path) -> None:
    assert set(open_text("a.jsonl, c.txt", column="x").documents()) == {"a", "c0", "c1"}
    with pytest.raises(ConfigError, match="text_dtype: expected nothing beside these texts"):
        open_text("a.jsonl, c.txt", dtype="uint16")
    with pytest.raises(ConfigError, match="text_column: expected nothing beside these texts"):
        open_text("python-docs, c.txt", column="x")


@pytest.mark.parametrize(
    ("dataset", "error", "message"),
    [
        ("a.jsonl@0, b.jsonl", ConfigError, "dataset: expected texts with weights above 0, got the weights"),
        ("a.jsonl@1e999, b.jsonl", ConfigError, "weights above 0"),
        ("a.jsonl,, b.jsonl", ConfigError, "dataset: expected names with commas between"),
        ("a.jsonl,", ConfigError, "dataset: expected names with commas between"),
        ("a.jsonl, nowhere.txt@0.5", DataError, "nowhere.txt.*no such file"),
    ],
)
def test_what_is_no_mixture_is_told(folder: Path, dataset: str, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        open_text(dataset)


def test_chats_in_any_part_are_chats() -> None:
    text, chats = open_text(["the cat"] * 3), open_text([[{"role": "user", "content": "the cat"}]] * 3)
    assert [part.holds_chats for part in (text, chats)] == [False, True]
    assert mixed([(text, 0.9), (chats, 0.1)]).holds_chats
    assert not mixed([(text, 0.9), (open_text([[1, 2]]), 0.1)]).holds_chats
