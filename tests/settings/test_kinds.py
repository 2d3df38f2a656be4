from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pytest

from flashsae.errors import ConfigError
from flashsae.settings.kinds import PositiveInt, Range, check_fields, expand


@dataclass(frozen=True)
class Settings:
    size: PositiveInt = 1
    ratio: Annotated[float, Range("a number above 1", lambda value: value > 1)] | None = None
    word: str = "w"
    place: Path | None = None
    which: Literal["a", "b"] = "a"
    ids: tuple[int, ...] | None = None
    is_on: bool = False

    def __post_init__(self) -> None:
        check_fields(self)


def test_what_means_the_same_is_taken_as_the_declared_type() -> None:
    settings = Settings(
        size=1e6,  # type: ignore[arg-type]
        ratio=2,
        word=Path("a/b"),  # type: ignore[arg-type]
        place="~/c",  # type: ignore[arg-type]
        ids=[np.int64(3)],  # type: ignore[arg-type]
    )
    assert settings == Settings(1_000_000, 2.0, "a/b", Path.home() / "c", "a", (3,))
    assert type(settings.size) is int
    assert type(settings.ratio) is float


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("size", 1.5, "size: expected a whole number below 2**63, such as 1_000_000, got 1.5."),
        ("size", True, "size: expected a whole number"),
        ("size", "3", "size: expected a whole number"),
        ("size", None, "size: expected a whole number"),
        ("size", 2**63, "size: expected a whole number"),
        ("size", float("nan"), "size: expected a whole number"),
        ("size", -1, "size: expected a positive number, got -1."),
        ("ratio", 1, "ratio: expected a number above 1, got 1."),
        ("ratio", "2", "ratio: expected a number, got '2'."),
        ("ratio", 10**400, "ratio: expected a number, got 1000"),
        ("word", 3, "word: expected a string, got 3."),
        ("word", "a\0b", "word: expected a string"),
        ("place", "", "place: expected a path, got ''."),
        ("which", "c", "which: expected one of a, b, got 'c'."),
        ("which", ["a"], "which: expected one of a, b"),
        ("ids", 3, "ids: expected a list of whole numbers, got 3."),
        ("ids", [3, "x"], "ids: expected a list of whole numbers, got [3, 'x']."),
        ("is_on", 1, "is_on: expected true or false, got 1."),
        ("is_on", "no", "is_on: expected true or false, got 'no'."),
    ],
)
def test_what_does_not_is_refused_by_name(name: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        Settings(**{name: value})  # type: ignore[arg-type]
    assert str(raised.value).startswith(message)


def test_the_home_of_somebody_who_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="a path whose user exists"):
        expand("~nobody-of-this-name/x")


@pytest.mark.parametrize(
    "address", ["hf://me/x", "hf:/me/x", Path("hf://me/x"), "https://x.org/a", "s3://a/b", "file:///x"]
)
def test_an_address_is_no_path(address: str | Path) -> None:
    with pytest.raises(ConfigError, match=r"^run: expected a path on this machine, got '[a-z3]+:/.*'\. From the hub"):
        expand(address, "run")


@pytest.mark.parametrize("path", ["C:/x", "a:b/c", "x/hf:/y", "h.6:in", "/hf:/x"])
def test_other_colons_are_of_a_path(path: str) -> None:
    assert expand(path) == Path(path)
