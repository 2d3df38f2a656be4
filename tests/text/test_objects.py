"""Texts that a program has: lists of anything, data sets of the library, generators that are read once, functions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import datasets
import numpy as np
import pandas
import pyarrow
import pytest
import torch

from flashsae.errors import ConfigError, DataError
from flashsae.text.content import Chat, Tokens
from flashsae.text.open import open_text

TEXTS = ["alpha", "", "beta", "gamma"]
ROWS = [{"text": text, "id": i} for i, text in enumerate(TEXTS)]
NUMBERED = [(0, "alpha"), (2, "beta"), (3, "gamma")]
CHAT = [{"role": "user", "content": "hi"}]


class Repeatable:
    def __iter__(self) -> Iterator[str]:
        return iter(TEXTS)


class Numbered(torch.utils.data.Dataset[str]):
    def __len__(self) -> int:
        return len(TEXTS)

    def __getitem__(self, place: int) -> str:
        return TEXTS[place]


def generate() -> Iterator[str]:
    yield from TEXTS


TABLE = datasets.Dataset.from_list(ROWS)
OBJECTS: dict[str, Any] = {
    "list": TEXTS,
    "tuple": tuple(TEXTS),
    "rows": ROWS,
    "array": np.array(TEXTS),
    "series": pandas.Series(TEXTS),
    "frame": pandas.DataFrame(ROWS),
    "arrow": pyarrow.table({"text": TEXTS}),
    "data set": TABLE,
    "with a format": TABLE.with_format("numpy"),
    "indices": datasets.Dataset.from_list(ROWS[::-1]).select([3, 2, 1, 0]),
    "splits": datasets.DatasetDict(train=TABLE, test=TABLE.select([0])),
    "streamed": TABLE.to_iterable_dataset(),
    "function": generate,
    "lambda of rows": lambda: iter(ROWS),
    "own class": Repeatable(),
    "of torch": Numbered(),
    "opened": open_text(TEXTS),
}


@pytest.mark.parametrize("kind", OBJECTS)
def test_what_can_be_read_again_gives_the_same_from_any_number_on(kind: str) -> None:
    text = open_text(OBJECTS[kind])
    for start in (0, 1, 2, 3, 4, 9, 0):
        assert list(text.numbered(start)) == [row for row in NUMBERED if row[0] >= start]
    assert text.fingerprint == open_text(OBJECTS[kind]).fingerprint
    if text.in_any_order is not None:
        documents = text.in_any_order()
        assert [documents[i] for i in (3, 0, 1)] == ["gamma", "alpha", ""]
        assert len(documents) == text.n_documents == 4


def test_the_same_texts_have_the_same_fingerprint_in_memory() -> None:
    in_memory = [kind for kind in OBJECTS if open_text(OBJECTS[kind]).n_documents is not None]
    assert len(in_memory) > 8
    assert len({open_text(OBJECTS[kind]).fingerprint for kind in in_memory}) == 1


@pytest.mark.parametrize("make", [list, datasets.Dataset.from_list, lambda rows: lambda: iter(rows), iter])
def test_a_change_is_seen(make: Any) -> None:
    changed = [*ROWS[:2], {"text": "Beta", "id": 2}, ROWS[3]]
    assert open_text(make(ROWS)).fingerprint != open_text(make(changed)).fingerprint


def test_a_generator_is_read_once_and_what_it_gave_again() -> None:
    taken: list[str] = []

    def watched() -> Iterator[str]:
        for content in TEXTS:
            taken.append(content)
            yield content

    text = open_text(watched())
    assert taken == TEXTS[:1]
    for start in (0, 2, 0):
        assert list(text.numbered(start)) == [row for row in NUMBERED if row[0] >= start]
    assert taken == TEXTS
    assert text.fingerprint == open_text(watched()).fingerprint
    assert list(open_text(iter(ROWS), column="text").numbered()) == NUMBERED


def test_an_endless_generator_is_read_as_far_as_it_is_used() -> None:
    text = open_text(str(i) for i in iter(int, 1))
    rows = text.numbered(1000)
    assert next(rows) == (1000, "0")
    endless = open_text(lambda: (str(i) for i in iter(int, 1)))
    assert next(endless.numbered(5)) == (5, "0")
    assert len(endless.fingerprint) == 12


@pytest.mark.parametrize(
    ("texts", "column", "expected"),
    [
        ([[1, 2], [3]], None, [Tokens([1, 2]), Tokens([3])]),
        (np.array([[1, 2], [3, 4]]), None, [Tokens([1, 2]), Tokens([3, 4])]),
        ([np.array([1, 2], np.uint16)], None, [Tokens([1, 2])]),
        ([torch.tensor([1, 2]), torch.tensor([3])], None, [Tokens([1, 2]), Tokens([3])]),
        (torch.tensor([[1, 2], [3, 4]]), None, [Tokens([1, 2]), Tokens([3, 4])]),
        (datasets.Dataset.from_dict({"input_ids": [[1, 2]]}).with_format("torch"), None, [Tokens([1, 2])]),
        ([Tokens([1], [True]), "text", Chat(CHAT)], None, [Tokens([1], [True]), "text", Chat(CHAT)]),
        ([CHAT], None, [Chat(CHAT)]),
        ([[], [1, 2], [3]], None, [Tokens([1, 2]), Tokens([3])]),
        ([torch.tensor([1, 2]), torch.tensor([])], None, [Tokens([1, 2])]),
        ([{"input_ids": [1, 0], "attention_mask": [1, 0]}], None, [Tokens([1])]),
        (datasets.Dataset.from_dict({"input_ids": [[1, 2], [3]]}), None, [Tokens([1, 2]), Tokens([3])]),
        (datasets.Dataset.from_dict({"messages": [CHAT]}).to_iterable_dataset(), None, [Chat(CHAT)]),
        (lambda: iter([{"a": "x", "b": "y"}]), "a,b", ["x\ny"]),
        ([{"a": "x"}, {"a": "y", "b": "z"}], "a", ["x", "y"]),
    ],
)
def test_texts_may_be_tokens_chats_and_rows(texts: Any, column: str | None, expected: list[Any]) -> None:
    text = open_text(texts, column=column)
    assert list(text.documents()) == expected
    assert text.fingerprint == open_text(texts, column=column).fingerprint


def test_the_columns_that_are_taken_stand_in_the_name() -> None:
    rows = datasets.Dataset.from_dict({"input_ids": [[1]], "id": [3]})
    assert open_text(rows).name == "a data set of 1 rows (column 'input_ids')"
    assert open_text(rows.to_iterable_dataset()).name == "a streamed data set (column 'input_ids')"


def test_a_function_that_does_not_begin_anew_is_refused() -> None:
    once, other, numbers = iter(TEXTS), iter(TEXTS), iter(range(100))
    for function in (lambda: once, lambda: (text for text in other), lambda: iter([str(next(numbers))])):
        with pytest.raises(DataError, match=r"^a stream of documents begins with another document .* a new iterator"):
            open_text(function)


def fails_at_two() -> Iterator[str]:
    yield "a"
    yield "b"
    raise KeyError("what is\nmissing")


@pytest.mark.parametrize(
    ("texts", "settings", "message"),
    [
        (["a", 3], {}, "got int at index 1"),
        (["a", None], {}, "got NoneType at index 1"),
        ([["a"]], {}, "got list at index 0"),
        ([[1, -2]], {}, "text: index 0: expected token ids from 0"),
        ([{"body": "a"}], {}, "text: index 0: there is no column 'text'; it has 'body'"),
        ([{"text": "a"}, "b", 3], {}, "text: index 2: expected an object"),
        (pandas.Series(["a", float("nan")]), {}, "got float at index 1"),
        ((x for x in (1, 2)), {}, "got int at index 0"),
        (iter([]), {}, "a generator of documents is empty"),
        (lambda: None, {}, "expected a function that returns an iterator, got one of NoneType"),
        (lambda: "text", {}, "expected a function that returns an iterator, got one of str"),
        (fails_at_two, {}, "a stream of documents fails at document 2 with KeyError: 'what is"),
        (fails_at_two(), {}, "a generator of documents fails at document 2 with KeyError"),
        (datasets.Dataset.from_dict({"body": ["a"]}), {}, "there is no column 'text'; it has 'body'"),
        (OBJECTS["splits"], {"split": "dev"}, "text_split: this data set has the splits train, test, got 'dev'"),
        (["a"], {"column": "text"}, "^text_column: expected nothing beside this text"),
        (generate, {"column": "text"}, "^text_column: expected nothing beside this text"),
        (generate(), {"column": "text"}, "^text_column: expected nothing beside this text"),
        (generate, {"split": "test"}, "^text_split: expected nothing beside this text"),
        (TABLE, {"split": "test"}, "^text_split: expected nothing beside a data set in memory"),
        (ROWS, {"revision": "main"}, "^text_revision: expected nothing beside this text"),
        (ROWS, {"download": True}, "^text_download: expected nothing beside this text"),
        (OBJECTS["opened"], {"column": "a"}, "^text_column: expected nothing beside a text that is open"),
    ],
)
def test_what_is_no_text_is_told(texts: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises((DataError, ConfigError), match=message) as caught:
        list(open_text(texts, **settings).documents())
    assert "\n" not in str(caught.value)


def test_a_split_of_several(tmp_path: Any) -> None:
    assert list(open_text(OBJECTS["splits"], split="test").documents()) == ["alpha"]
