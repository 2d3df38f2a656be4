from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from flashsae.errors import CheckpointError
from flashsae.files.schema import Count, Finite, Name, Size, Text, parse


@dataclass(frozen=True)
class Inner:
    rows: Size
    sums: dict[Name, Count] = field(default_factory=dict)


@dataclass(frozen=True)
class Outer:
    kind: Literal["a", "b"]
    rate: Finite
    parts: list[Inner]
    done: bool
    note: Text | None = None
    place: Path | None = None
    anything: Any = None


GOOD: dict[str, Any] = {"kind": "a", "rate": 1, "parts": [{"rows": 3, "sums": {"h.0": 0}}], "done": True}


def test_what_fits_becomes_the_dataclass() -> None:
    read = parse(Outer, {**GOOD, "place": "x/y", "anything": [1], "of a later version": 1}, "f")
    assert read == Outer("a", 1.0, [Inner(3, {"h.0": 0})], True, None, Path("x/y"), [1])
    assert isinstance(read.rate, float)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"kind": "c"}, "kind: expected one of a, b, got 'c'"),
        ({"kind": True}, "kind: expected one of a, b, got True"),
        ({"rate": float("nan")}, "rate: expected a number finite, got nan"),
        ({"rate": float("inf")}, "rate: expected a number finite, got inf"),
        ({"rate": 10**400}, "rate: expected a number, got 1000"),
        ({"rate": True}, "rate: expected a number, got True"),
        ({"done": 1}, "done: expected true or false, got 1"),
        ({"parts": {}}, "parts: expected a list, got {}"),
        ({"parts": [3]}, r"parts\[0\]: expected an object, got 3"),
        ({"parts": [{}]}, r"parts\[0\]\.rows: expected a whole number, got nothing"),
        ({"parts": [{"rows": 0}]}, r"parts\[0\]\.rows: expected a number of at least 1, got 0"),
        ({"parts": [{"rows": 2**63}]}, r"parts\[0\]\.rows: expected a number of at least 1, got 9223"),
        ({"parts": [{"rows": 1.0}]}, r"parts\[0\]\.rows: expected a whole number, got 1\.0"),
        ({"parts": [{"rows": 1, "sums": {"../x": 1}}]}, r"a name in parts\[0\]\.sums: .* got '\.\./x'"),
        ({"parts": [{"rows": 1, "sums": {"a/b": 1}}]}, ".*fit for a file, got 'a/b'"),
        ({"parts": [{"rows": 1, "sums": {".": 1}}]}, ".*fit for a file"),
        ({"note": 3}, "note: expected text, got 3"),
        ({"note": "\ud800"}, "note: expected text that is without NUL and lone surrogates"),
        ({"place": "a\0"}, "place: expected a path"),
    ],
)
def test_what_does_not_fit_is_one_sentence(edit: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=f"^f is damaged: {message}") as error:
        parse(Outer, {**GOOD, **edit}, "f", "Do this.")
    assert str(error.value).endswith(". Do this.")
    assert str(error.value).isascii()


@pytest.mark.parametrize("name", ["kind", "rate", "parts", "done"])
def test_what_is_missing_is_named(name: str) -> None:
    with pytest.raises(CheckpointError, match=f"f is damaged: {name}: expected .*, got nothing"):
        parse(Outer, {key: value for key, value in GOOD.items() if key != name}, "f")


@pytest.mark.parametrize("value", [None, [], 3, "x"])
def test_other_content_is_refused(value: object) -> None:
    with pytest.raises(CheckpointError, match="f is damaged: content: expected an object"):
        parse(Outer, value, "f")
