"""The one check of settings: every value against the type that its field declares, wherever the value comes from.

A field's annotation says all: `int`, `float`, `bool`, `str`, `Path`, a `Literal`, `tuple[str, ...]`, each perhaps
`| None`, and the range in an `Annotated`. Values from Python and TOML pass `check`, words of a command line `parse`.
"""

from __future__ import annotations

import functools
import json
import math
import numbers
import operator
import os
import re
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from flashsae.errors import ConfigError
from flashsae.natural import did_you_mean

_LARGEST_INT = 2**63 - 1
_OPEN = object()

T = TypeVar("T")


@dataclass(frozen=True)
class Range:
    """The values that a number may have.

    Args:
        words: what is expected, for messages.
        holds: tells whether a number is in range.
    """

    words: str
    holds: Callable[[float], bool]


@dataclass(frozen=True)
class AtMost:
    """A bound that another setting is: part of a field's annotation, as `Range` is.

    Args:
        name: of the other setting.
        words: what it is called in messages; its name by default.
    """

    name: str
    words: str = ""


@dataclass(frozen=True)
class Length:
    """How many numbers a list has: part of a field's annotation, as `Range` is.

    Args:
        numbers: so many.
    """

    numbers: int

    @property
    def words(self) -> str:
        """What is expected, for messages."""
        return f"a list of {self.numbers} numbers"

    def holds(self, value: tuple[Any, ...]) -> bool:
        """Tell whether a tuple is of this length."""
        return len(value) == self.numbers


@dataclass(frozen=True)
class KeyValues:
    """A list of NAME=VALUE, each name once: part of a field's annotation, as `Range` is. A table stands for one too."""

    words: str = "NAME=VALUE, each name once"

    def holds(self, value: tuple[str, ...]) -> bool:
        """Tell whether all are such, with names that an argument can have."""
        names = [word.partition("=")[0] for word in value if "=" in word]
        return len(set(names)) == len(value) and all(map(str.isidentifier, names))

    @staticmethod
    def of(table: Mapping[str, Any]) -> tuple[str, ...]:
        """Return a table as such a list; what is no plain word stands there as JSON."""
        return tuple(f"{name}={_word(value)}" for name, value in table.items())


@dataclass(frozen=True)
class Joined:
    """A string that may be given as a list of strings: part of a field's annotation, as `Range` is.

    Args:
        between: what stands between them in the one string.
    """

    between: str


JOINED = Joined(", ")
POSITIVE = Range("a positive number", lambda value: 0 < value < math.inf)
NOT_NEGATIVE = Range("a number that is not negative", lambda value: 0 <= value < math.inf)
FRACTION = Range("a fraction from 0 to 1", lambda value: 0 <= value <= 1)
DECAY = Range("a number from 0 to below 1", lambda value: 0 <= value < 1)
ABOVE_ZERO = Range("a number above 0 that float32 holds", lambda value: 2.0**-126 <= value < 2.0**128)

PositiveInt = Annotated[int, POSITIVE]
PositiveFloat = Annotated[float, POSITIVE]
NonNegativeInt = Annotated[int, NOT_NEGATIVE]
NonNegativeFloat = Annotated[float, NOT_NEGATIVE]
Fraction = Annotated[float, FRACTION]

LeftOpen = Annotated[T, _OPEN]
"""The type of a setting that may be left open: None until `left_open.fill` puts its value. Who reads it reads settings
that are filled, and a type checker takes it so."""


def check_fields(settings: Any) -> None:
    """Check every field of a frozen dataclass; put 1e6 for an int, or ~/acts for a Path, as what they mean.

    Raises:
        ConfigError: a value has another type than its field declares, or is out of its range.
    """
    for name, annotation in declared_types(settings.__class__).items():
        value = getattr(settings, name)
        meant = check(name, value, annotation)
        if meant is not value:
            object.__setattr__(settings, name, meant)


def as_json(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings by name as a JSON file gives them back: a tuple is a list there, a path is text."""
    return dict(json.loads(json.dumps(dict(settings), default=os.fspath)))


@functools.cache
def declared_types(dataclass: Any) -> dict[str, Any]:
    """Return the annotation of each field of a dataclass, by name."""
    hints = get_type_hints(dataclass, include_extras=True)
    return {field.name: hints[field.name] for field in fields(dataclass)}


def check(name: str, value: Any, annotation: Any) -> Any:
    """Return a value as its declared type has it.

    Args:
        name: of the setting, for messages.
        value: from Python or TOML.
        annotation: the declared type.
    Raises:
        ConfigError: the value is of another type, or out of range.
    """
    kind, limits, is_optional = unwrap(annotation)
    if kind is Any or (value is None and is_optional):
        return value
    if isinstance(value, Mapping) and any(isinstance(limit, KeyValues) for limit in limits):
        value = KeyValues.of(value)
    for joined in metadata_of(annotation, Joined):
        if isinstance(value, (list, tuple)) and value and all(isinstance(each, str) for each in value):
            value = joined.between.join(value)
    try:
        meant = _CHECKS.get(get_origin(kind) or kind, _instance)(value, kind)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error
    except (TypeError, ValueError, OverflowError):
        near = did_you_mean(value, get_args(kind)) if get_origin(kind) is Literal else ""
        raise ConfigError(f"{name}: expected {_words(kind)}, got {_shown(value)}.{near}") from None
    for limit in limits:
        if not limit.holds(meant):
            raise ConfigError(f"{name}: expected {limit.words}, got {_shown(value)}.")
    return meant


def parse(word: str, annotation: Any) -> Any:
    """Return what a word of the command line means as a declared type, unchecked where it means nothing.

    Args:
        word: as it was typed.
        annotation: the declared type; of a tuple, that of one element.
    """
    kind, _, _ = unwrap(annotation)
    if kind is int or kind is float:
        try:
            return int(word)
        except ValueError:
            pass
        try:
            return float(word)
        except ValueError:
            return word
    return word


def metadata_of(annotation: Any, kind: type[T]) -> list[T]:
    """Return what of a kind an annotation is annotated with."""
    return [each for each in getattr(annotation, "__metadata__", ()) if isinstance(each, kind)]


def unwrap(annotation: Any) -> tuple[Any, list[Range | Length | KeyValues], bool]:
    """Return the bare type of an annotation, its ranges or length, and whether None is allowed."""
    limits: list[Range | Length | KeyValues] = []
    is_optional = False
    while True:
        origin = get_origin(annotation)
        if origin is Annotated:
            for limit in (Range, Length, KeyValues):
                limits += metadata_of(annotation, limit)
            is_optional = is_optional or _OPEN in annotation.__metadata__
            annotation = annotation.__origin__
        elif origin in (Union, types.UnionType):
            is_optional = True
            (annotation,) = (choice for choice in get_args(annotation) if choice is not type(None))
        else:
            return annotation, limits, is_optional


def _word(value: Any) -> str:
    """Return a value as JSON, and a string that JSON would not take for something else as it is."""
    if not isinstance(value, str):
        return json.dumps(value, default=str)
    try:
        json.loads(value)
    except ValueError:
        return value
    return json.dumps(value)


def _int(value: Any, kind: Any) -> int:
    if isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool"):  # NumPy's is an index until 2.2
        raise TypeError
    if isinstance(value, float):
        if not value.is_integer():
            raise ValueError
        value = int(value)  # 1e6 is how people write a million
    number = operator.index(value)
    if abs(number) > _LARGEST_INT:
        raise ValueError
    return number


def _float(value: Any, kind: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError
    return float(value)


def _bool(value: Any, kind: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


def _str(value: Any, kind: Any) -> str:
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, str) or not value or "\0" in value:
        raise TypeError
    return value


def _path(value: Any, kind: Any) -> Path:
    return expand(_str(value, kind))


_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:[/\\]")
"""How hf://, https:// and s3:// begin, also behind `Path`, which drops a slash; C:/ is a drive of Windows."""
_OF_THE_HUB = (
    "From the hub flashsae convert fetches SAEs, flashsae push writes them there, and texts are named USER/NAME."
)


def expand(path: str | os.PathLike[str], name: str = "") -> Path:
    """Return a path with ~ put as the home folder: the one way in for the paths of people.

    Args:
        path: of something that need not exist.
        name: of the argument, for messages.
    Raises:
        ConfigError: it is no path, of a user that there is not, none that the file system lets one look for, or an
            address such as hf://USER/NAME, which would make a folder called hf: here.
    """
    start = f"{name}: " if name else ""
    try:
        found = Path(_str(path, Path)).expanduser()
        os.stat(found)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise ConfigError(f"{start}{os.strerror(error.errno or 0)}: {_shown(path)}. Give another path.") from error
    except RuntimeError as error:
        raise ConfigError(f"{start}expected a path whose user exists, got {_shown(path)}.") from error
    except (TypeError, ValueError) as error:  # of what cannot be a name: a NUL, half of a surrogate pair
        raise ConfigError(f"{start}expected a path, got {_shown(path)}.") from error
    if _ADDRESS.match(str(found)):
        raise ConfigError(f"{start}expected a path on this machine, got {_shown(path)}. {_OF_THE_HUB}")
    return found


def _literal(value: Any, kind: Any) -> Any:
    if not isinstance(value, str) or value not in get_args(kind):
        raise ValueError
    return value


def _tuple(value: Any, kind: Any) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise TypeError
    element = get_args(kind)[0]
    try:
        return tuple(check("", each, element) for each in value)
    except ConfigError:
        each = ", each ".join([_words(kind), *(limit.words for limit in unwrap(element)[1])])
        raise ConfigError(f"expected {each}, got {_shown(value)}.") from None


def _instance(value: Any, kind: Any) -> Any:
    if not isinstance(value, kind):
        raise TypeError
    return value


_CHECKS: dict[Any, Callable[[Any, Any], Any]] = {
    int: _int,
    float: _float,
    bool: _bool,
    str: _str,
    Path: _path,
    Literal: _literal,
    tuple: _tuple,
}


_ELEMENTS = {int: "whole numbers", float: "numbers"}


def _words(kind: Any) -> str:
    """Return what a type expects, for messages."""
    if get_origin(kind) is Literal:
        return f"one of {', '.join(get_args(kind))}"
    if get_origin(kind) is tuple:
        return f"a list of {_ELEMENTS.get(unwrap(get_args(kind)[0])[0], 'strings')}"
    words = {
        int: "a whole number below 2**63, such as 1_000_000",
        float: "a number",
        bool: "true or false",
        str: "a string",
        Path: "a path",
    }
    return words.get(kind, f"a {getattr(kind, '__name__', kind)}")


def _shown(value: Any) -> str:
    shown = repr(os.fspath(value) if isinstance(value, os.PathLike) else value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."
