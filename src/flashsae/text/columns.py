"""Which columns of a data set are read, and what document a row of them is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flashsae.errors import ConfigError, DataError
from flashsae.text.content import Chat, Content, Tokens

TEXT = "text"
_FOUND = ("input_ids", "messages", "conversations")
"""Columns that are known by their names where there is no text."""
_PADDING = "attention_mask"
_NO_LABEL = -100
"""What libraries of training write for tokens that a loss leaves out."""
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant"}
"""Of ShareGPT, and what chat templates call them."""


@dataclass(frozen=True)
class Columns:
    """The columns that hold a document.

    Args:
        names: one of text, token ids or messages; several of text, which are joined by a newline; or token ids and
            which of them make a row of activations.
    """

    names: tuple[str, ...]

    @classmethod
    def of(cls, asked: str | None, there: Iterable[str]) -> Columns:
        """Return the columns that are asked for, or else that of text, or the only one that is known by its name.

        Args:
            asked: a name, or several between commas.
            there: all that the data set has.
        Raises:
            ConfigError: a name is empty.
        """
        there = list(there)
        if asked is None:
            known = [name for name in _FOUND if name in there]
            return cls((known[0],) if len(known) == 1 and TEXT not in there else (TEXT,))
        names = (asked,) if asked in there else tuple(name.strip() for name in asked.split(","))
        if not all(names):
            raise ConfigError(f"text_column: expected a name, or several with commas between, got {asked!r}.")
        return cls(names)

    def __str__(self) -> str:
        return f"column{'s' * (len(self.names) > 1)} {', '.join(map(repr, self.names))}"

    def to_read(self, there: Iterable[str], where: str) -> list[str]:
        """Return the columns of a table that are needed; DataError naming `where` if one is not there."""
        there = list(there)
        for name in self.names:
            if name not in there:
                raise _missing(name, there, where)
        return [*self.names, *([_PADDING] if _PADDING in there and _PADDING not in self.names else [])]

    def content(self, row: Any, where: str) -> Content:
        """Return the document that a row is; an absent value is an empty text.

        Args:
            row: values by column.
            where: what stands before a complaint.
        Raises:
            DataError: it is no row, lacks a column, or holds something that is no document.
        """
        if not isinstance(row, Mapping):
            raise DataError(f"{where}: expected an object with the field {self.names[0]!r}, got {_kind(row)}.")
        try:
            values = [row[name] for name in self.names]
        except KeyError:
            raise _missing(next(name for name in self.names if name not in row), row, where) from None
        if len(values) == 1 and isinstance(values[0], str):
            return values[0]
        try:
            if _is_tokens(values[0]):
                return _tokens(values, row.get(_PADDING))
            if len(values) == 1 and _is_chat(values[0]):
                return chat_of(values[0])
        except DataError as error:
            raise DataError(f"{where}: {self}: {error}") from None
        return "\n".join(filter(None, (_text(value, name, where) for value, name in zip(values, self.names))))


def _text(value: Any, name: str, where: str) -> str:
    if value is None or (isinstance(value, Sequence | np.ndarray) and len(value) == 0):
        return ""
    if not isinstance(value, str):
        raise DataError(
            f"{where}: column {name!r} should hold text, token ids or messages, got {_kind(value)}; choose another "
            "column."
        )
    return value


def _kind(value: Any) -> str:
    is_list = isinstance(value, list | tuple) and len(value) > 0
    return f"{type(value).__name__} of {type(value[0]).__name__}" if is_list else type(value).__name__


def _is_tokens(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return value.dtype.kind in "iuf" and len(value) > 0
    return isinstance(value, list | tuple) and len(value) > 0 and isinstance(value[0], int | np.integer)


def _tokens(values: Sequence[Any], padding: Any) -> Tokens:
    """Return tokens without those that are padding; of the second column, if there is one, which of them are kept."""
    tokens = Tokens(values[0])
    if len(values) > 2:
        raise DataError("expected token ids and at most one mask beside them.")
    if len(values) == 2:
        mask = np.asarray(values[1])
        is_labels = mask.dtype.kind == "i" and (
            bool((mask == _NO_LABEL).any()) or (bool((mask > 1).any()) and np.array_equal(mask, tokens.ids))
        )
        tokens = Tokens(tokens.ids, mask != _NO_LABEL if is_labels else mask)
    if padding is None:
        return tokens
    is_read = Tokens(tokens.ids, padding).keep
    assert is_read is not None
    return Tokens(tokens.ids[is_read], None if tokens.keep is None else tokens.keep[is_read])


def _is_chat(value: Any) -> bool:
    if isinstance(value, Mapping):
        return bool(value)
    return isinstance(value, list | tuple | np.ndarray) and len(value) > 0 and isinstance(value[0], Mapping)


def chat_of(value: Any) -> Chat:
    """Return a list of messages, those of ShareGPT too, as a chat; DataError where it is none."""
    return Chat([_message(each) for each in _messages(value)])


def _messages(value: Any) -> Iterable[Any]:
    """Return messages one by one, also where the lists stand in the message and not the messages in a list."""
    if not isinstance(value, Mapping):
        return list(value)
    if not all(isinstance(each, list | tuple) for each in value.values()) or len(set(map(len, value.values()))) != 1:
        raise DataError(f"expected a list of messages, got an object with {', '.join(map(repr, value))}.")
    return [dict(zip(value, each)) for each in zip(*value.values())]


def _message(message: Any) -> Any:
    """Return a message with a role and a content; what is absent in all but the content is left out."""
    if not isinstance(message, Mapping):
        return message
    kept = {name: value for name, value in message.items() if value is not None or name in ("content", "value")}
    if "from" in kept and "value" in kept and "role" not in kept:
        role, content = kept.pop("from"), kept.pop("value")
        return {"role": _ROLES.get(role, role) if isinstance(role, str) else role, "content": content, **kept}
    return kept


def _missing(column: str, columns: Iterable[str], where: str) -> DataError:
    names = ", ".join(repr(name if len(name) <= 60 else f"{name[:57]}...") for name in columns) or "no column at all"
    return DataError(
        f"{where}: there is no column {column!r}; it has {names}. Name the right one with --text-column (column=)."
    )
