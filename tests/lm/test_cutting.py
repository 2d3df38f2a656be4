"""Every token of every document becomes a row once, whatever it shares its inputs with and however they overlap."""

from __future__ import annotations

import dataclasses
import itertools
import pickle
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from flashsae.errors import ConfigError
from flashsae.lm.windows import Windows, first_tokens
from flashsae.settings.reading import ReadingConfig
from flashsae.text.content import Block, Tokens

BOS, EOS = 0, 18


def windows(
    tiny: ModuleType, *, bos: bool = True, eos: bool = True, suffix: bool = False, part: Any = None, **settings: Any
) -> Windows:
    from tokenizers import processors

    tokenizer = tiny.word_tokenizer(bos=bos)
    if eos:
        tokenizer.add_special_tokens({"eos_token": "</s>"})
    if suffix:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
        )
    config = dataclasses.replace(
        ReadingConfig("tiny", hookpoint="h.1", context_length=8, forward_tokens=40), **settings
    )
    return Windows(tokenizer, config.filled(), 64, part)


def inputs(made: Windows, block: Block) -> list[list[tuple[int, int, bool]]]:
    """Return the inputs of the model in reading order, each as (token, document, whether it makes a row)."""
    found: dict[int, list[tuple[int, int, bool]]] = {}
    for batch in made.batches(block):
        for row, place in enumerate(batch.order.tolist()):
            n = int(batch.attention[row].sum())
            columns = (batch.ids[row, :n], batch.documents[row, :n], batch.keep[row, :n])
            found[place] = list(zip(*(column.tolist() for column in columns)))
            assert not batch.keep[row, n:].any()
    assert sorted(found) == list(range(len(found)))
    return [found[place] for place in sorted(found)]


def documents(lengths: Sequence[int]) -> Block:
    """Return documents whose tokens all differ from those of their neighbours."""
    ids = itertools.cycle(range(2, 18))
    return [(3 * place + 1, Tokens([next(ids) for _ in range(n)])) for place, n in enumerate(lengths)]


def rows_of(read: list[list[tuple[int, int, bool]]], document: int) -> list[int]:
    return [token for window in read for token, number, keep in window if keep and number == document]


LENGTHS = [(1,), (5,), (6,), (7,), (8,), (20,), (1, 1, 1, 1, 1, 1, 1, 1, 1), (3, 30, 2, 1, 14, 6, 7, 8, 1, 40), ()]


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("bos_every", ["context", "document"])
@pytest.mark.parametrize("overlap", [0, 1, 3, 5])
@pytest.mark.parametrize("suffix", [False, True])
def test_every_token_makes_one_row(tiny: ModuleType, pack: bool, bos_every: str, overlap: int, suffix: bool) -> None:
    made = windows(tiny, suffix=suffix, pack=pack, bos_every=bos_every, overlap=overlap)
    for lengths in LENGTHS:
        block = documents(lengths)
        read = inputs(made, block)
        assert all(len(window) <= 8 for window in read)
        assert not suffix or all(window[-1][0] == EOS != window[-2][0] for window in read)
        for number, content in block:
            assert isinstance(content, Tokens)
            assert rows_of(read, number) == content.ids.tolist()


@pytest.mark.parametrize("overlap", [0, 1, 3, 6])
@pytest.mark.parametrize("bos", [False, True])
def test_an_input_that_goes_on_repeats_the_end_of_the_one_before(tiny: ModuleType, overlap: int, bos: bool) -> None:
    (document,) = documents([33])
    assert isinstance(document[1], Tokens)
    ids = document[1].ids.tolist()
    at = 0
    for number, window in enumerate(inputs(windows(tiny, bos=bos, overlap=overlap), [document])):
        again = overlap if number else 0
        tokens = [token for token, _, _ in window]
        assert tokens[:bos] == [BOS] * bos
        assert tokens[bos:] == ids[at - again : at - again + 8 - bos]
        assert [keep for _, _, keep in window] == [False] * (bos + again) + [True] * (len(window) - bos - again)
        at += 8 - bos - again
    assert at >= len(ids)


def test_documents_are_packed_with_eos_between_them_into_whole_inputs(tiny: ModuleType) -> None:
    made = windows(tiny, pack=True)
    block: Block = [(0, "the cat"), (1, "sat on a mat"), (4, "and then it went out to see what was there"), (5, "cat")]
    read = inputs(made, block)
    assert [[token for token, _, _ in window] for window in read] == [
        [BOS, 2, 3, EOS, 4, 5, 6, 7],
        [BOS, 8, 9, 10, 11, 12, 13, 14],
        [BOS, 15, 16, 17, EOS, 3],
    ]
    assert [[number for _, number, _ in window] for window in read] == [
        [0, 0, 0, 0, 1, 1, 1, 1],
        [4] * 8,
        [4, 4, 4, 4, 4, 5],
    ]
    assert [[token for token, _, keep in window if not keep] for window in read] == [[BOS, EOS], [BOS], [BOS, EOS]]
    kept = inputs(windows(tiny, pack=True, mask_special=False), block)
    assert all(keep for window in kept for _, _, keep in window)


@pytest.mark.parametrize(
    ("of_tokenizer", "settings", "expected"),
    [
        ({}, {"bos_every": "document"}, [[BOS, 2, 3, BOS, 4, 5, 6, 7], [8, 9, BOS, 10]]),
        ({}, {"bos_every": "document", "overlap": 2}, [[BOS, 2, 3, BOS, 4, 5, 6, 7], [6, 7, 8, 9, BOS, 10]]),
        ({}, {"prepend_bos": False}, [[2, 3, EOS, 4, 5, 6, 7, 8], [9, EOS, 10]]),
        ({"eos": False}, {}, [[BOS, 2, 3, BOS, 4, 5, 6, 7], [BOS, 8, 9, BOS, 10]]),
        ({"bos": False}, {}, [[2, 3, EOS, 4, 5, 6, 7, 8], [9, EOS, 10]]),
        ({"bos": False, "eos": False}, {}, [[2, 3, 4, 5, 6, 7, 8, 9], [10]]),
    ],
)
def test_what_stands_between_packed_documents_is_what_the_tokenizer_has(
    tiny: ModuleType, of_tokenizer: dict[str, bool], settings: dict[str, Any], expected: list[list[int]]
) -> None:
    made = windows(tiny, pack=True, **of_tokenizer, **settings)
    block: Block = [(0, Tokens([2, 3])), (1, Tokens([4, 5, 6, 7, 8, 9])), (2, Tokens([10]))]
    read = inputs(made, block)
    assert [[token for token, _, _ in window] for window in read] == expected
    assert [rows_of(read, number) for number in range(3)] == [[2, 3], [4, 5, 6, 7, 8, 9], [10]]


def test_what_the_tokenizer_puts_behind_a_text_stands_between_packed_ones(tiny: ModuleType) -> None:
    def read(**settings: Any) -> list[list[int]]:
        block: Block = [(0, "<s> the cat </s>"), (1, "sat on"), (2, "a mat")]
        made = windows(tiny, suffix=True, pack=True, **settings)
        return [[token for token, _, _ in window] for window in inputs(made, block)]

    assert read() == [[BOS, 2, 3, EOS, 4, 5, EOS], [BOS, 6, 7, EOS]]
    assert read(bos_every="document") == [[BOS, 2, 3, EOS, BOS, 4, 5, EOS], [BOS, 6, 7, EOS]]


def test_bos_at_each_document_alone(tiny: ModuleType) -> None:
    block = documents([20, 3])
    read = inputs(windows(tiny, bos_every="document"), block)
    assert [[token for token, _, _ in window].index(BOS) if window[0][0] == BOS else None for window in read] == [
        *(0, None, None),
        0,
    ]
    assert [len(window) for window in read] == [8, 8, 5, 4]


def test_a_separator_that_a_document_ends_with_is_not_doubled(tiny: ModuleType) -> None:
    block: Block = [(0, Tokens([2, 3, EOS])), (1, "<s> the cat </s>"), (2, Tokens([EOS])), (3, Tokens([7]))]
    read = inputs(windows(tiny, pack=True), block)
    assert [[token for token, _, _ in window] for window in read] == [[BOS, 2, 3, EOS, 2, 3, EOS, 7]]
    apart = inputs(windows(tiny), block)
    assert [token for token, _, _ in apart[0]] == [BOS, 2, 3, EOS]


@pytest.mark.parametrize("settings", [{}, {"overlap": 2}, {"bos_every": "document"}])
def test_documents_of_two_parts_share_no_input(tiny: ModuleType, settings: dict[str, Any]) -> None:
    def is_third(number: int) -> bool:
        return number % 3 == 0

    lengths = [1 + 7 * place % 11 for place in range(60)]
    block: Block = [(number, content) for number, (_, content) in enumerate(documents(lengths))]
    made = windows(tiny, pack=True, part=is_third, **settings)
    read = inputs(made, block)
    assert all(len({is_third(number) for _, number, _ in window}) == 1 for window in read)
    whole = 7 if "bos_every" in settings else 8  # where only a BOS would have had room, there is none
    assert sum(len(window) < whole for window in read) <= 2
    for number, content in block:
        assert isinstance(content, Tokens)
        assert rows_of(read, number) == content.ids.tolist()
    for part in (False, True):
        alone = inputs(windows(tiny, pack=True, **settings), [each for each in block if is_third(each[0]) == part])
        assert alone == [window for window in read if is_third(window[0][1]) == part]
    first = [window[0][1] for window in read]
    assert first == sorted(first)  # whoever stops early has read both parts


def test_the_first_tokens_of_packed_inputs(tiny: ModuleType) -> None:
    batches = windows(tiny, pack=True, overlap=2).batches(documents([5, 30, 1, 1, 9]))
    for n in (0, 1, 7, 20, 46, 99):
        cut = first_tokens(batches, n)
        assert sum(int(batch.keep.sum()) for batch in cut) == min(n, 46)


def test_skipped_positions_count_what_is_repeated(tiny: ModuleType) -> None:
    (window, later, *_) = inputs(windows(tiny, skip_first=5, overlap=3), documents([20]))
    assert [keep for _, _, keep in window] == [False] * 5 + [True] * 3
    assert [keep for _, _, keep in later] == [False] * 5 + [True] * 3


def test_packed_inputs_are_batched_and_nothing_is_padded_but_the_last(tiny: ModuleType) -> None:
    batches = windows(tiny, pack=True).batches(documents([3, 9, 2, 25, 1, 1, 4, 17, 6, 10]))
    padding = sum(int((batch.attention == 0).sum()) for batch in batches)
    assert 0 < padding < 8
    assert all(batch.ids.numel() <= 40 for batch in batches)


@pytest.mark.parametrize("make", [lambda ids: ids, lambda ids: np.array(ids, np.uint16), lambda ids: ids[::1]])
def test_inputs_are_a_function_of_the_ids_alone(tiny: ModuleType, make: Callable[[Any], Any]) -> None:
    made = windows(tiny)
    text: Block = [(0, "the cat sat on a mat and then it went out")]
    ids = [2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]
    (of_text, of_ids) = (made.batches(block) for block in (text, [(0, Tokens(make(ids)))]))
    for a, b in zip(of_text, of_ids, strict=True):
        for each in dataclasses.fields(a):
            assert torch.equal(getattr(a, each.name), getattr(b, each.name))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"overlap": 7}, "overlap: expected fewer than 7, the tokens of an input without special ones, got 7"),
        ({"overlap": 8}, r"overlap: expected fewer than the 8 tokens of an input \(context_length\), got 8"),
        ({"overlap": -1}, "overlap: expected a number that is not negative"),
        ({"bos_every": "window"}, "bos_every: expected one of context, document"),
        ({"bos_every": "document", "prepend_bos": False}, "bos_every: expected nothing beside --no-prepend-bos"),
    ],
)
def test_settings_that_leave_no_room_are_refused(tiny: ModuleType, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        windows(tiny, **settings)


def test_bos_at_each_document_needs_one(tiny: ModuleType) -> None:
    with pytest.raises(ConfigError, match=r"^bos_every: the tokenizer .* no input with a BOS token; leave"):
        windows(tiny, bos=False, bos_every="document")
    tokenizer = tiny.word_tokenizer()
    tokenizer.bos_token = "<s>"
    config = ReadingConfig("tiny", hookpoint="h.1", context_length=8, bos_every="document")
    with pytest.raises(ConfigError, match=r"^bos_every: the tokenizer .* no input with a BOS token; add --prepend-bos"):
        Windows(tokenizer, config.filled(), 64)
    made = Windows(tokenizer, dataclasses.replace(config, prepend_bos=True).filled(), 64)
    assert inputs(made, documents([20]))[0][0][0] == BOS


def is_odd(number: int) -> bool:
    return number % 2 == 1


def test_windows_can_be_sent_to_another_process(tiny: ModuleType) -> None:
    made = windows(tiny, pack=True, overlap=2, part=is_odd)
    block = documents([5, 30, 1, 1, 9])
    assert inputs(pickle.loads(pickle.dumps(made)), block) == inputs(made, block)
