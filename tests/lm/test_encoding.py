"""Tokens are read as they are, chats as their template writes them, and what the model does not know is refused."""

from __future__ import annotations

import dataclasses
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from flashsae.errors import ConfigError, DataError
from flashsae.lm.windows import TokenBatch, Windows
from flashsae.settings.reading import ReadingConfig
from flashsae.text.content import Block, Chat, Tokens

CHAT = Chat([{"role": "cat", "content": "the mat"}, {"role": "assistant", "content": "went out"}])


def windows(tokenizer: Any, vocabulary: int | None = 64, **settings: Any) -> Windows:
    config = ReadingConfig("tiny", hookpoint="h.1", context_length=16, forward_tokens=64, **settings)
    return Windows(tokenizer, config.filled(), vocabulary)


def same(a: list[TokenBatch], b: list[TokenBatch]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(getattr(one, each.name), getattr(other, each.name))
        for one, other in zip(a, b)
        for each in dataclasses.fields(TokenBatch)
    )


def kept(batches: list[TokenBatch]) -> list[int]:
    return [token for batch in batches for token in batch.ids[batch.keep].tolist()]


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("dtype", [None, np.uint16, np.uint32, np.int64, ">u2"])
def test_tokens_are_read_as_the_text_that_they_are_of(tiny: ModuleType, bos: bool, dtype: Any) -> None:
    tokenizer = tiny.word_tokenizer(bos=bos)
    texts = [*tiny.DOCUMENTS[:8], "the cat xyzzy sat", "<s> the cat"]
    for special in (False, True):
        ids = tokenizer(texts, add_special_tokens=special)["input_ids"]
        tokens = [Tokens(each if dtype is None else np.array(each, dtype)) for each in ids]
        made = windows(tokenizer, mask_special=special)
        assert same(made.batches(list(enumerate(tokens))), made.batches(list(enumerate(texts))))


def test_kinds_of_documents_may_be_mixed(tiny: ModuleType) -> None:
    made = windows(tiny.chat_tokenizer())
    block: Block = [(0, "the cat"), (1, Tokens([4, 5])), (2, CHAT), (3, "on a mat"), (4, Tokens([2]))]
    batches = made.batches(block)
    rows = {number: [] for number, _ in block}
    for batch in batches:
        for token, number in zip(batch.ids[batch.keep].tolist(), batch.documents[batch.keep].tolist()):
            rows[number].append(token)
    assert rows == {0: [2, 3], 1: [4, 5], 2: [3, 2, 7, 19, 11, 12], 3: [5, 6, 7], 4: [2]}


@pytest.mark.parametrize("pack", [False, True])
def test_what_a_mask_leaves_out_is_read_and_makes_no_row(tiny: ModuleType, pack: bool) -> None:
    made = windows(tiny.word_tokenizer(bos=True), pack=pack)
    ids = list(range(2, 18)) * 2
    keep = [place % 3 == 0 for place in range(32)]
    masked = made.batches([(0, Tokens(ids, keep)), (1, Tokens([5, 6]))])
    whole = made.batches([(0, Tokens(ids)), (1, Tokens([5, 6]))])
    assert all(torch.equal(one.ids, other.ids) for one, other in zip(masked, whole, strict=True))
    assert sorted(kept(masked)) == sorted([*(token for token, is_kept in zip(ids, keep) if is_kept), 5, 6])


def test_the_mask_of_a_special_token_that_is_added_anyway_goes_with_it(tiny: ModuleType) -> None:
    made = windows(tiny.word_tokenizer(bos=True))
    assert kept(made.batches([(0, Tokens([0, 2, 3, 4], [True, False, True, True]))])) == [3, 4]


def test_documents_without_a_token_make_no_input(tiny: ModuleType) -> None:
    for pack in (False, True):
        made = windows(tiny.word_tokenizer(bos=True), pack=pack)
        block: Block = [(0, Tokens([])), (1, "<s>"), (2, Tokens([0, 0]))]
        assert made.batches(block) == []
        batches = made.batches([(0, "the"), *((number + 1, content) for number, content in block), (5, "cat")])
        assert kept(batches) == [2, 3]


@pytest.mark.parametrize(("vocabulary", "known"), [(20, 19), (None, 17)])
def test_ids_that_the_model_does_not_know_are_refused(tiny: ModuleType, vocabulary: int | None, known: int) -> None:
    made = windows(tiny.word_tokenizer(bos=True), vocabulary)
    assert kept(made.batches([(7, Tokens(np.array([2, known], np.uint16)))])) == [2, known]
    with pytest.raises(DataError, match=rf"document 7 has the token {known + 1}\b.*the ids 0 to {known}\."):
        made.batches([(6, "the cat"), (7, Tokens(np.array([2, known + 1], np.uint16)))])
    with pytest.raises(DataError, match=r"document 7 has the token 2147483647, and the model knows"):
        made.batches([(7, Tokens([2**31 - 1]))])


def test_a_chat_is_read_as_its_template_writes_it(tiny: ModuleType) -> None:
    tokenizer = tiny.chat_tokenizer()
    turn, assistant = tokenizer.convert_tokens_to_ids(["<turn>", "assistant"])
    (batch,) = windows(tokenizer).batches([(0, CHAT)])
    ids = [turn, 3, 2, 7, turn, assistant, 11, 12]
    assert batch.ids.tolist() == [[0, *ids]]
    assert ids == tokenizer.apply_chat_template(CHAT.messages, return_dict=True)["input_ids"]
    assert kept([batch]) == [token for token in ids if token != turn]
    assert kept(windows(tokenizer, mask_special=False).batches([(0, CHAT)])) == [0, *ids]


def test_a_template_that_writes_bos_gets_no_second_one(tiny: ModuleType) -> None:
    plain = windows(tiny.chat_tokenizer()).batches([(0, CHAT)])
    assert same(windows(tiny.chat_tokenizer("{{ bos_token }}" + tiny.CHAT_TEMPLATE)).batches([(0, CHAT)]), plain)


def test_of_a_chat_the_assistant_alone(tiny: ModuleType) -> None:
    tokenizer = tiny.chat_tokenizer()
    whole, part = (windows(tokenizer, assistant_only=only).batches([(0, CHAT)]) for only in (False, True))
    assert torch.equal(whole[0].ids, part[0].ids)
    assert kept(part) == [11, 12]
    unmarked = windows(tiny.chat_tokenizer("{{ messages[0]['content'] }}"), assistant_only=True)
    with pytest.raises(
        ConfigError, match=r"assistant_only: the chat template .* does not mark what the assistant says"
    ):
        unmarked.batches([(0, CHAT)])
    for content, what in (("the cat", "text"), (Tokens([2]), "tokens")):
        with pytest.raises(ConfigError, match=f"assistant_only: expected chats.*document 3 is {what}"):
            windows(tokenizer, assistant_only=True).batches([(3, content)])


@pytest.mark.parametrize("only", [False, True])
def test_a_tokenizer_without_a_template_is_refused_in_a_sentence(tiny: ModuleType, only: bool) -> None:
    made = windows(tiny.chat_tokenizer(None), assistant_only=only)
    with pytest.raises(ConfigError, match=r"^model: its tokenizer has no chat template, and the documents are chats\."):
        made.batches([(0, CHAT)])


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", r"roles must alternate\)"),
        ("{{ messages[0]['content']['parts'].x }}", "has no attribute"),
        ("{% for message in messages %}", "."),
        ({"tools": "{{ messages }}"}, "."),
    ],
)
def test_a_chat_that_a_template_refuses_is_named(tiny: ModuleType, template: Any, reason: str) -> None:
    made = windows(tiny.chat_tokenizer(template))
    with pytest.raises(DataError, match=rf"^document 5: the chat template of the tokenizer cannot write .*{reason}"):
        made.batches([(4, "the cat"), (5, CHAT)])
