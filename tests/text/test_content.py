"""Documents of text, tokens and chats: what they may hold, how long they are, which are blank."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from flashsae.errors import DataError
from flashsae.text.content import Chat, Content, Tokens, encodable, is_blank
from flashsae.text.dataset import TextDataset


def test_tokens_are_arrays_of_their_own_dtype() -> None:
    ids = np.array([5, 6, 65535], dtype=np.uint16)
    tokens = Tokens(ids, [1, 0, True])
    assert tokens.ids is ids
    assert tokens.keep is not None
    assert tokens.keep.tolist() == [True, False, True]
    assert len(tokens) == 12
    assert tokens == Tokens([5, 6, 65535], [True, False, True]) != Tokens([5, 6, 65535])
    assert Tokens([1]) != Tokens([1], [True])
    assert Tokens([1]) != [1]
    assert repr(Tokens([1, 2], [0, 1])) == "Tokens([1, 2], [False, True])"


@pytest.mark.parametrize(
    "ids", [[1.5], [[1, 2]], [[1], [2, 3]], 3, ["a"], [-1], [2**31], [2**70], [True], None, [1, None]]
)
def test_what_are_no_ids_is_refused(ids: object) -> None:
    with pytest.raises(DataError, match=r"^expected (a flat list of token ids|token ids from 0 to below 2\*\*31)"):
        Tokens(ids)  # type: ignore[arg-type]


@pytest.mark.parametrize("keep", [[1], [1, 0, 1], [0.5, 1.0], ["a", "b"], [[1], [0]]])
def test_what_is_no_mask_is_refused(keep: object) -> None:
    with pytest.raises(DataError, match="expected a mask of 0 and 1, one for each of 2 tokens"):
        Tokens([1, 2], keep)  # type: ignore[arg-type]


def test_a_chat_has_the_length_of_what_is_said() -> None:
    parts = [{"type": "text", "text": "ab"}, {"type": "image"}]
    chat = Chat([{"role": "user", "content": "abc"}, {"role": "assistant", "content": parts, "name": "x" * 99}])
    assert len(chat) == len("abc" + "text" + "ab" + "image")
    for messages in (["hello"], [{"content": "a"}], [{"role": 1, "content": "a"}]):
        with pytest.raises(DataError, match=r"expected a list of messages, each with a .role.*, got .* at place 0"):
            Chat(messages)  # type: ignore[arg-type]


BLANK: list[Content] = [
    "",
    " \n",
    Tokens([]),
    Tokens([1, 2], [0, 0]),
    Chat([]),
    Chat([{"role": "user", "content": None}]),
]
FULL: list[Content] = ["a", Tokens([0]), Tokens([1, 2], [0, 1]), Chat([{"role": "user", "content": [{"text": "a"}]}])]


def test_blank_documents_of_any_kind_are_left_out_with_their_numbers() -> None:
    assert all(map(is_blank, BLANK))
    assert not any(map(is_blank, FULL))

    def rows(start: int) -> Iterator[tuple[int, Content]]:
        return iter(list(enumerate(BLANK + FULL))[start:])

    text = TextDataset("t", rows)
    assert list(text.numbered()) == [(len(BLANK) + i, content) for i, content in enumerate(FULL)]


def test_halves_of_surrogate_pairs_are_replaced_wherever_they_stand() -> None:
    assert encodable("cut \ud83d here") == "cut � here"
    tokens, whole = Tokens([1]), Chat([{"role": "user", "content": "a"}])
    assert encodable(tokens) is tokens
    assert encodable(whole) is whole
    assert encodable(Chat([{"role": "user", "content": [{"text": "\ud83d"}]}])) == Chat(
        [{"role": "user", "content": [{"text": "�"}]}]
    )
