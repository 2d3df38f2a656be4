"""Every token comes once, in a window as the tokenizer wants it, and padding changes nothing."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from types import ModuleType

import pytest
import torch

from flashsae.data.language_model import LanguageModelSource
from flashsae.data.text import open_text


@pytest.mark.parametrize(("name", "bos"), [("gpt2", False), ("llama", True), ("bert", False)])
def test_padding_and_neighbours_do_not_change_a_document(tiny: ModuleType, name: str, bos: bool) -> None:
    make, pattern = tiny.FAMILIES[name]
    model = make()
    config = dataclasses.replace(tiny.SMALL, hookpoints=(pattern,), batch_tokens=128)
    together, _ = tiny.collect(tiny.source(config, model=model, bos=bos), None)
    for document in (1, 4, 7):
        alone, _ = tiny.collect(tiny.source(config, open_text([tiny.DOCUMENTS[document]]), model=model, bos=bos), None)
        for hookpoint, chunk in alone.items():
            mine = together[hookpoint].select(together[hookpoint].group == document)
            assert torch.equal(tiny.need(mine.token_ids), tiny.need(chunk.token_ids))
            torch.testing.assert_close(mine.acts, chunk.acts, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bos", [False, True])
def test_every_word_comes_once_and_windows_hold_the_special_tokens(tiny: ModuleType, bos: bool) -> None:
    reader = tiny.source(bos=bos)
    chunk = tiny.collect(reader, None)[0]["h.1"]
    words = [reader.tokenizer(document, add_special_tokens=False)["input_ids"] for document in tiny.DOCUMENTS]
    content = 15 if bos else 16
    for document, ids in enumerate(words):
        rows = chunk.select(chunk.group == document)
        place = tiny.need(rows.position) - int(bos)
        windows = [ids[start : start + content] for start in range(0, len(ids), content)]
        expected = sorted(tuple(enumerate(window)) for window in windows)
        got = list(zip(place.tolist(), tiny.need(rows.token_ids).tolist()))
        starts = [i for i, (position, _) in enumerate(got) if position == 0] + [len(got)]
        assert sorted(tuple(got[a:b]) for a, b in pairwise(starts)) == expected


def test_special_tokens_are_kept_where_asked_and_padding_never(tiny: ModuleType) -> None:
    config = dataclasses.replace(tiny.SMALL, mask_special=False)
    masked = tiny.collect(tiny.source(bos=True), None)[0]["h.1"]
    kept = tiny.collect(tiny.source(config, bos=True), None)[0]["h.1"]
    is_bos = tiny.need(kept.token_ids) == 0
    assert torch.equal(is_bos, tiny.need(kept.position) == 0)
    assert tiny.same(kept.select(~is_bos), masked)
    n_windows = sum(-(-len(document.split()) // 15) for document in tiny.DOCUMENTS)
    assert int(is_bos.sum()) == n_windows


def test_what_the_tokenizer_adds_is_masked_even_where_it_is_an_ordinary_word(tiny: ModuleType) -> None:
    from tokenizers import processors

    tokenizer = tiny.word_tokenizer()
    ids = {word: tokenizer.convert_tokens_to_ids(word) for word in ("out", "there")}
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="out $A there", special_tokens=list(ids.items())
    )
    text = open_text(["the cat sat " * 20, "went out there"])
    reader = LanguageModelSource(tiny.SMALL, text, loaded=(tiny.gpt2(), tokenizer))
    chunk = tiny.collect(reader, None)[0]["h.1"]
    long = chunk.select(chunk.group == 0)
    assert len(long.acts) == 60
    assert set(tiny.need(long.position).tolist()) == set(range(1, 15))
    assert tiny.need(chunk.select(chunk.group == 1).token_ids).tolist()[1:] == list(ids.values())


def test_special_tokens_inside_a_text_are_masked(tiny: ModuleType) -> None:
    chunk = tiny.collect(tiny.source(text=open_text(["the cat xyzzy sat"])), None)[0]["h.1"]
    assert tiny.need(chunk.position).tolist() == [0, 1, 3]


def test_a_batch_holds_at_most_batch_tokens(tiny: ModuleType) -> None:
    model = tiny.gpt2()
    shapes: list[torch.Size] = []
    model.base_model.wte.register_forward_hook(lambda module, args, output: shapes.append(args[0].shape))
    reader = tiny.source(model=model)
    shapes.clear()
    tiny.collect(reader, None)
    assert all(shape.numel() <= 64 for shape in shapes)
    assert max(shape.numel() for shape in shapes) > 48
    n_tokens = sum(len(document.split()) for document in tiny.DOCUMENTS)
    assert sum(shape.numel() for shape in shapes) < 1.2 * n_tokens
