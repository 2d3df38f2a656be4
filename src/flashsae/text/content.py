"""What a document may be: text, the ids of its tokens, or a chat; and what is said of any of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from flashsae.errors import DataError

_CHARACTERS_PER_TOKEN = 4
"""Of English; so that a block of tokens is about as much work as one of text."""


class Tokens:
    """A document that somebody else has tokenised.

    Args:
        ids: [n], whole numbers that are not negative: a list, or an array of an integer dtype, which is not copied.
        keep: [n], true (or not 0) where a token is one of the text; None: everywhere. An attention mask is such.
    Raises:
        DataError: they are no such numbers, or not as many.
    """

    __slots__ = ("ids", "keep")
    ids: np.ndarray
    """[n], an integer dtype."""
    keep: np.ndarray | None
    """[n], bool."""

    def __init__(self, ids: Sequence[int] | np.ndarray, keep: Sequence[bool] | np.ndarray | None = None) -> None:
        self.ids = _integers(ids)
        self.keep = None
        if keep is not None:
            mask = np.asarray(keep)
            if mask.shape != self.ids.shape or mask.dtype.kind not in "biu":
                raise DataError(
                    f"expected a mask of 0 and 1, one for each of {len(self.ids)} tokens, got {mask.dtype} of shape "
                    f"{list(mask.shape)}."
                )
            self.keep = mask.astype(bool, copy=False)

    def __len__(self) -> int:
        """Return about how many characters these tokens stand for, which is what blocks of documents count."""
        return _CHARACTERS_PER_TOKEN * len(self.ids)

    def __eq__(self, other: object) -> bool:
        """Tell whether ids and masks are equal; no mask is another one than a mask of all."""
        if not isinstance(other, Tokens):
            return NotImplemented
        is_same_mask = (self.keep is None) == (other.keep is None)
        if is_same_mask and self.keep is not None and other.keep is not None:
            is_same_mask = np.array_equal(self.keep, other.keep)
        return is_same_mask and np.array_equal(self.ids, other.ids)

    __hash__ = None  # type: ignore[assignment]  # an array can be changed

    def __repr__(self) -> str:
        return f"Tokens({self.ids.tolist()!r}{'' if self.keep is None else f', {self.keep.tolist()!r}'})"


def _integers(ids: Sequence[int] | np.ndarray) -> np.ndarray:
    """Return token ids as an array; DataError where they are none."""
    try:
        array = np.asarray(ids)
    except (ValueError, OverflowError):  # rows of several lengths
        array = np.empty((0, 0))
    if array.ndim == 1 and not array.size:
        array = array.astype(np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise DataError(f"expected a flat list of token ids, whole numbers, got {_shown(ids)}.")
    if array.size and (array.min() < 0 or array.max() >= 2**31):
        raise DataError(
            f"expected token ids from 0 to below 2**31, got {int(array.min() if array.min() < 0 else array.max())}."
        )
    return array


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


@dataclass(frozen=True)
class Chat:
    """A document that is a conversation, to be put through the chat template of a tokenizer.

    Args:
        messages: each with its "role" and "content", and whatever else a template may read.
    Raises:
        DataError: they are no such messages.
    """

    messages: Sequence[Mapping[str, Any]]

    def __post_init__(self) -> None:
        for place, message in enumerate(self.messages):
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise DataError(
                    f"expected a list of messages, each with a 'role' and a 'content', got {_shown(message)} at place "
                    f"{place}."
                )

    def __len__(self) -> int:
        """Return how many characters the messages have."""
        return sum(map(len, _strings([message.get("content") for message in self.messages])))


Content: TypeAlias = str | Tokens | Chat
"""Of a document."""
Block: TypeAlias = list[tuple[int, Content]]
"""Documents with their numbers."""


def is_blank(content: Content) -> bool:
    """Tell whether there is nothing to read in a document: white space, no token, no word of anybody."""
    if isinstance(content, str):
        return not content.strip()
    if isinstance(content, Tokens):
        return len(content) == 0 or (content.keep is not None and not content.keep.any())
    return not any(text.strip() for text in _strings([message.get("content") for message in content.messages]))


def encodable(content: Content) -> Content:
    """Return what can be written as UTF-8: halves of surrogate pairs, left by cut emojis, become U+FFFD."""
    if isinstance(content, str):
        return _encodable(content)
    if isinstance(content, Chat) and any(text != _encodable(text) for text in _strings(content.messages)):
        return Chat(_replaced(content.messages))
    return content


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _strings(value: Any) -> list[str]:
    """Return all strings that nested lists and dicts hold."""
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return [text for each in inner for text in _strings(each)]


def _replaced(value: Any) -> Any:
    """Return nested lists and dicts with all strings encodable."""
    if isinstance(value, str):
        return _encodable(value)
    if isinstance(value, Mapping):
        return {_replaced(key): _replaced(each) for key, each in value.items()}
    return [_replaced(each) for each in value] if isinstance(value, (list, tuple)) else value
