"""What is read from disk, checked against the types that a dataclass declares.

Whoever reads a file declares what he expects as a dataclass and calls `parse`; nothing else looks at raw JSON or TOML.
"""

from __future__ import annotations

import re
import sys
import types
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from flashsae.errors import CheckpointError

T = TypeVar("T")


@dataclass(frozen=True)
class Range:
    """A number from `low` to `high`, both included; never NaN or infinite."""

    low: float = -sys.float_info.max
    high: float = sys.float_info.max

    def __str__(self) -> str:
        if self.high in (sys.float_info.max, LARGEST):
            return "finite" if self.low == -sys.float_info.max else f"of at least {self.low:g}"
        return f"from {self.low:g} to {self.high:g}"


@dataclass(frozen=True)
class Pattern:
    """Text that matches a regular expression as a whole; `name` says it in words."""

    regex: str
    name: str

    def __str__(self) -> str:
        return f"that is {self.name}"


LARGEST = 2**63 - 1
Count = Annotated[int, Range(0, LARGEST)]
Size = Annotated[int, Range(1, LARGEST)]
Finite = Annotated[float, Range()]
Positive = Annotated[float, Range(sys.float_info.min)]
Fraction = Annotated[float, Range(0, 1)]
_PRINTABLE = "[^\0\ud800-\udfff]*"
Text = Annotated[str, Pattern(_PRINTABLE, "without NUL and lone surrogates")]
"""Text that can be printed and can be looked for in the file system."""
Name = Annotated[str, Pattern(r"\w[\w.-]*(:\w[\w.-]*)*", "a plain name (or some with : between them), fit for a file")]
"""A name that may become part of a path: no separator, no drive, nothing that leads out of the folder."""


def parse(kind: type[T], value: Any, where: str, advice: str = "Write it again.") -> T:
    """Return `value` as `kind`, or say what is wrong with it.

    Args:
        kind: a dataclass, or whatever its fields may be: bool, int, float, str, Path, None, Any, a Literal, a union,
            list, tuple[X, ...] and dict[str, X] of these, each Annotated with a `Range` or `Pattern` if need be. A
            plain float may be NaN. Fields with a default may be missing; what is not declared is passed over.
        value: as JSON or TOML give it.
        where: the file, for the message.
        advice: what to do, for the message.
    Raises:
        CheckpointError: one sentence that names the first field that does not fit.
    """
    try:
        return _parse(kind, value, "")  # type: ignore[no-any-return]
    except _MisfitError as error:
        raise CheckpointError(f"{where} is damaged: {error}. {advice}") from error


class _MisfitError(ValueError):
    def __init__(self, place: str, expected: str, value: Any) -> None:
        got = "nothing" if value is MISSING else repr(value)
        got = got if len(got) <= 60 else f"{got[:57]}..."
        super().__init__(f"{place.lstrip('.') or 'content'}: expected {expected}, got {ascii(got)[1:-1]}")


def _parse(kind: Any, value: Any, place: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin is Annotated:
        return _limited(_parse(arguments[0], value, place), arguments[1:], place)
    if origin in (Union, types.UnionType):
        return _union(arguments, value, place)
    if origin is Literal:
        if value not in [choice for choice in arguments if type(choice) is type(value)]:
            raise _MisfitError(place, "one of " + ", ".join(map(str, arguments)), value)
        return value
    if origin in (list, tuple):
        if not isinstance(value, list | tuple):
            raise _MisfitError(place, "a list", value)
        return origin(_parse(arguments[0], each, f"{place}[{i}]") for i, each in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise _MisfitError(place, "an object", value)
        return {
            _parse(arguments[0], name, f"a name in {place.lstrip('.')}"): _parse(arguments[1], each, f"{place}.{name}")
            for name, each in value.items()
        }
    return _record(kind, value, place) if is_dataclass(kind) else _scalar(kind, value, place)


def _record(kind: Any, value: Any, place: str) -> Any:
    if not isinstance(value, dict):
        raise _MisfitError(place, "an object", value)
    hints = get_type_hints(kind, include_extras=True)
    content = {}
    for field in fields(kind):
        if field.name in value:
            content[field.name] = _parse(hints[field.name], value[field.name], f"{place}.{field.name}")
        elif field.default is MISSING and field.default_factory is MISSING:
            raise _MisfitError(f"{place}.{field.name}", _words(hints[field.name]), MISSING)
    return kind(**content)


def _union(choices: tuple[Any, ...], value: Any, place: str) -> Any:
    for choice in choices:
        try:
            return _parse(choice, value, place)
        except _MisfitError as error:
            if choice is choices[0]:
                first = error
    if len([choice for choice in choices if choice is not type(None)]) == 1:
        raise first  # the one kind that it may have, and says best what is wrong
    raise _MisfitError(place, " or ".join(map(_words, choices)), value)


def _limited(value: Any, limits: tuple[Any, ...], place: str) -> Any:
    for limit in limits:
        if isinstance(limit, Range) and not limit.low <= value <= limit.high:
            raise _MisfitError(place, f"a number {limit}", value)
        if isinstance(limit, Pattern) and not re.fullmatch(limit.regex, value):
            raise _MisfitError(place, f"text {limit}", value)
    return value


_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path"}


def _words(kind: Any) -> str:
    if get_origin(kind) is Annotated:
        return _words(get_args(kind)[0])
    return "null" if kind is type(None) else _WORDS.get(kind, "a value")


def _scalar(kind: Any, value: Any, place: str) -> Any:
    wrong = _MisfitError(place, _words(kind), value)
    if kind is type(None):
        if value is not None:
            raise wrong
        return None
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise wrong from None
    is_kind = isinstance(value, str if kind is Path else kind) and (kind is bool or not isinstance(value, bool))
    if not is_kind or (kind is Path and not re.fullmatch(_PRINTABLE, value)):
        raise wrong
    return Path(value) if kind is Path else value
