"""The plan's words on inputs: every token that makes no row is counted once, under the reason that holds first."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest

from flashsae.lm.tally import Tally, inputs_in_words
from flashsae.lm.windows import Windows
from flashsae.settings.reading import ReadingConfig
from flashsae.text.content import Block, Tokens

BLOCK: Block = [
    (0, Tokens(list(range(2, 18)), [place != 9 for place in range(16)])),
    (1, "the cat xyzzy sat"),
    (2, Tokens([2, 3])),
]


def windows(tiny: ModuleType, *, bos: bool = True, **settings: Any) -> Windows:
    config = ReadingConfig("tiny", hookpoint="h.1", context_length=8, forward_tokens=16, **settings).filled()
    return Windows(tiny.word_tokenizer(bos=bos), config, 64)


@pytest.mark.parametrize(
    ("settings", "tokens", "left_out", "padding"),
    [
        ({}, 27, {"special tokens": 6, "masked": 1}, 4),
        ({"mask_special": False}, 27, {"masked": 1}, 4),
        ({"skip_first": 2}, 27, {"special tokens": 6, "masked": 1, "skip_first": 5}, 4),
        ({"exclude_ids": (3, 5)}, 27, {"special tokens": 6, "masked": 1, "exclude_ids": 4}, 4),
        ({"overlap": 3, "skip_first": 2}, 37, {"special tokens": 7, "overlap": 9, "masked": 1, "skip_first": 3}, 5),
        ({"pack": True}, 27, {"special tokens": 6, "masked": 1}, 5),
    ],
)
def test_every_token_without_a_row_has_one_reason(
    tiny: ModuleType, settings: dict[str, Any], tokens: int, left_out: dict[str, int], padding: int
) -> None:
    made = windows(tiny, **settings)
    tally = made.tally(BLOCK)
    batches = made.batches(BLOCK)
    rows = sum(int(batch.keep.sum()) for batch in batches)
    assert tally.tokens == sum(int(batch.attention.sum()) for batch in batches)
    assert tally.padding == sum(int((batch.attention == 0).sum()) for batch in batches)
    assert tally.tokens - sum(tally.left_out.values()) == rows
    assert (tally.documents, tally.tokens, tally.padding) == (3, tokens, padding)
    assert {reason: n for reason, n in tally.left_out.items() if n} == left_out


def test_shares_in_words() -> None:
    left_out = {"special tokens": 100, "overlap": 0, "masked": 1, "skip_first": 99, "exclude_ids": 0}
    assert str(Tally(1200, 10_000, left_out, 2500)) == (
        "of the tokens read 2.0% are left out: special tokens 1.0%, masked less than 0.1%, skip_first 1.0%; 20.0% of "
        "the forwards is padding (by the first 1,200 documents)"
    )
    assert str(Tally(1, 0, dict.fromkeys(left_out, 0), 0)) == (
        "of the tokens read none is left out; 0.0% of the forwards is padding (by the first document)"
    )


@pytest.mark.parametrize(
    ("bos", "settings", "words"),
    [
        (True, {}, "8 tokens, documents apart, <s> at each"),
        (False, {}, "8 tokens, documents apart, no special token around them"),
        (True, {"bos_every": "document"}, "8 tokens, documents apart, <s> at each document alone"),
        (True, {"prepend_bos": False}, "8 tokens, documents apart, no special token around them"),
        (True, {"pack": True}, "8 tokens, documents packed, <s> at each, <s> between documents"),
        (False, {"pack": True}, "8 tokens, documents packed, nothing between documents"),
        (
            True,
            {"pack": True, "overlap": 2, "bos_every": "document", "assistant_only": True},
            "8 tokens, documents packed, the last 2 again where a document goes on, rows of the assistant's words "
            "alone, <s> at each document alone, <s> between documents",
        ),
    ],
)
def test_every_choice_is_told(tiny: ModuleType, bos: bool, settings: dict[str, Any], words: str) -> None:
    made = windows(tiny, bos=bos, **settings)
    assert str(made) == words
    of_cache = ReadingConfig("tiny", hookpoint="h.1", context_length=8, **settings).filled().of_tokens()
    assert words.startswith(inputs_in_words(of_cache))
