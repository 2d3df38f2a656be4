"""What document a row is: text, several joined, token ids without padding, a chat; and which columns are taken."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from flashsae.errors import ConfigError, DataError
from flashsae.text.columns import Columns
from flashsae.text.content import Chat, Content, Tokens

USER, MODEL = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes?"}


def content(row: Any, asked: str | None = None) -> Content:
    return Columns.of(asked, row).content(row, "x, line 1")


@pytest.mark.parametrize(
    ("there", "asked", "names"),
    [
        (["text", "messages"], None, ("text",)),
        (["id", "input_ids", "attention_mask"], None, ("input_ids",)),
        (["messages", "id"], None, ("messages",)),
        (["conversations"], None, ("conversations",)),
        (["messages", "input_ids"], None, ("text",)),  # which of them is not plain: reading names all
        (["body"], None, ("text",)),
        (["title", "body"], "title, body", ("title", "body")),
        (["title,body"], "title,body", ("title,body",)),
        ([], "body", ("body",)),
    ],
)
def test_columns_are_those_asked_for_or_the_only_one_that_is_known(
    there: list[str], asked: str | None, names: tuple[str, ...]
) -> None:
    assert Columns.of(asked, there).names == names


@pytest.mark.parametrize("asked", ["", "a,,b", ",", "a,"])
def test_an_empty_name_is_refused(asked: str) -> None:
    with pytest.raises(ConfigError, match=r"text_column: expected a name, or several with commas between, got"):
        Columns.of(asked, ["a", "b"])


@pytest.mark.parametrize(
    ("row", "asked", "expected"),
    [
        ({"text": "a"}, None, "a"),
        ({"text": None}, None, ""),
        ({"text": []}, None, ""),
        ({"title": "a", "body": "b"}, "title,body", "a\nb"),
        ({"title": "a", "body": "b"}, "body,title", "b\na"),
        ({"title": None, "body": "b"}, "title,body", "b"),
        ({"title": "", "body": None}, "title,body", ""),
        ({"input_ids": [3, 4]}, None, Tokens([3, 4])),
        ({"input_ids": np.array([3, 4], np.uint16)}, None, Tokens([3, 4])),
        ({"input_ids": [0, 3, 4, 0], "attention_mask": [0, 1, 1, 0]}, None, Tokens([3, 4])),
        ({"input_ids": [3, 4], "attention_mask": None}, None, Tokens([3, 4])),
        ({"input_ids": [0, 3, 4], "attention_mask": [0, 1, 1], "m": [1, 1, 0]}, "input_ids,m", Tokens([3, 4], [1, 0])),
        ({"input_ids": [3, 4, 5], "labels": [-100, 4, 5]}, "input_ids,labels", Tokens([3, 4, 5], [0, 1, 1])),
        ({"input_ids": [0, 4, 5], "labels": [0, 4, 5]}, "input_ids,labels", Tokens([0, 4, 5], [1, 1, 1])),
        ({"input_ids": [0, 1, 1], "mask": [0, 1, 1]}, "input_ids,mask", Tokens([0, 1, 1], [0, 1, 1])),
        ({"ids": [3]}, "ids", Tokens([3])),
        ({"messages": [USER, MODEL]}, None, Chat([USER, MODEL])),
        ({"messages": [{**USER, "tool_calls": None}]}, None, Chat([USER])),
        ({"messages": {"role": ["user", "assistant"], "content": ["hi", "yes?"]}}, None, Chat([USER, MODEL])),
        ({"messages": np.array([USER, MODEL], object)}, None, Chat([USER, MODEL])),
        ({"messages": [USER | {"content": None}]}, None, Chat([USER | {"content": None}])),
        (
            {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes?"}]},
            None,
            Chat([USER, MODEL]),
        ),
        ({"conversations": [{"from": "tool", "value": "42"}]}, None, Chat([{"role": "tool", "content": "42"}])),
    ],
)
def test_a_row_is_a_document(row: dict[str, Any], asked: str | None, expected: Content) -> None:
    assert content(row, asked) == expected


@pytest.mark.parametrize(
    ("row", "asked", "message"),
    [
        (
            {"body": "a", "id": 1},
            None,
            "there is no column 'text'; it has 'body', 'id'. Name the right one with --text-",
        ),
        ({"messages": [USER], "input_ids": [1]}, None, "no column 'text'; it has 'messages', 'input_ids'"),
        ({"title": "a"}, "title,body", "no column 'body'; it has 'title'"),
        ({}, None, "it has no column at all"),
        ({"x" * 100: 1}, None, r"it has 'x{57}\.\.\.'\."),
        ({"text": 3}, None, "column 'text' should hold text, token ids or messages, got int; choose another column"),
        ({"text": ["a", "b"]}, None, "got list of str"),
        ({"text": b"a"}, None, "got bytes"),
        ({"text": True}, None, "got bool"),
        ({"a": "b", "c": 3}, "a,c", "column 'c' should hold text.* got int"),
        ({"input_ids": [1, 2.5]}, None, "column 'input_ids': expected a flat list of token ids"),
        ({"input_ids": [1, -3]}, None, r"column 'input_ids': expected token ids from 0 to below 2\*\*31, got -3"),
        ({"input_ids": [1, 2], "attention_mask": [1]}, None, "expected a mask of 0 and 1, one for each of 2 tokens"),
        ({"a": [1, 2], "b": [1]}, "a,b", "columns 'a', 'b': expected a mask of 0 and 1"),
        ({"a": [1], "b": [1], "c": [1]}, "a,b,c", "expected token ids and at most one mask"),
        ({"messages": [USER, "hi"]}, None, "column 'messages': expected a list of messages, each with a 'role'"),
        ({"messages": [{"content": "a"}]}, None, "each with a 'role' and a 'content', got"),
        (
            {"messages": {"role": ["user"], "content": "hi"}},
            None,
            "expected a list of messages, got an object with 'role'",
        ),
        ([1], None, "expected an object with the field 'text', got list of int"),
    ],
)
def test_what_is_no_document_is_named(row: Any, asked: str | None, message: str) -> None:
    with pytest.raises(DataError, match=f"^x, line 1: .*{message}"):
        content(row, asked)
