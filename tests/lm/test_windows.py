"""Every token comes once, in a window as the tokenizer wants it, and padding changes nothing."""

from __future__ import annotations

import dataclasses
import hashlib
from itertools import pairwise
from types import ModuleType

import pytest
import torch

from flashsae.data.language_model import LanguageModelSource
from flashsae.errors import ConfigError, DataError
from flashsae.lm.windows import Windows
from flashsae.text.open import open_text


@pytest.mark.parametrize(("name", "bos"), [("gpt2", False), ("llama", True), ("bert", False)])
def test_padding_and_neighbours_do_not_change_a_document(tiny: ModuleType, name: str, bos: bool) -> None:
    make, pattern = tiny.FAMILIES[name]
    model = make()
    config = dataclasses.replace(tiny.SMALL, hookpoint=pattern, forward_tokens=128)
    together, _ = tiny.collect(tiny.source(config, model=model, bos=bos), None)
    for document in (1, 4, 7):
        alone, _ = tiny.collect(tiny.source(config, open_text([tiny.DOCUMENTS[document]]), model=model, bos=bos), None)
        mine = together.select(together.group == document)
        assert torch.equal(tiny.need(mine.token_ids), tiny.need(alone.token_ids))
        for hookpoint, acts in alone.acts.items():
            torch.testing.assert_close(mine.acts[hookpoint], acts, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bos", [False, True])
def test_every_word_comes_once_and_windows_hold_the_special_tokens(tiny: ModuleType, bos: bool) -> None:
    reader = tiny.source(bos=bos)
    chunk = tiny.collect(reader, None)[0]
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
    masked = tiny.collect(tiny.source(bos=True), None)[0]
    kept = tiny.collect(tiny.source(config, bos=True), None)[0]
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
    chunk = tiny.collect(reader, None)[0]
    long = chunk.select(chunk.group == 0)
    assert len(long.group) == 60
    assert set(tiny.need(long.position).tolist()) == set(range(1, 15))
    assert tiny.need(chunk.select(chunk.group == 1).token_ids).tolist()[1:] == list(ids.values())


def test_special_tokens_inside_a_text_are_masked(tiny: ModuleType) -> None:
    chunk = tiny.collect(tiny.source(text=open_text(["the cat xyzzy sat"])), None)[0]
    assert tiny.need(chunk.position).tolist() == [0, 1, 3]


def test_a_batch_holds_at_most_forward_tokens(tiny: ModuleType) -> None:
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


def test_the_first_positions_and_some_ids_can_be_left_out(tiny: ModuleType) -> None:
    plain = tiny.collect(tiny.source(), None)[0]
    changes = {"skip_first": 2, "exclude_ids": (3, 5)}
    chosen = tiny.collect(tiny.source(dataclasses.replace(tiny.SMALL, **changes)), None)[0]
    ids, position = tiny.need(plain.token_ids), tiny.need(plain.position)
    keep = (position >= 2) & (ids != 3) & (ids != 5)
    assert 0 < int(keep.sum()) < len(keep)
    assert tiny.same(plain.select(keep), chosen)


def test_what_the_model_reads_by_default_is_what_caches_and_runs_were_made_of(tiny: ModuleType) -> None:
    config = dataclasses.replace(tiny.SMALL, skip_first=3, exclude_ids=(5,)).filled()
    windows = Windows(tiny.word_tokenizer(bos=True), config, 64)
    digest = hashlib.sha256()
    for batch in windows.batches(list(enumerate(tiny.DOCUMENTS))):
        for tensor in (batch.ids, batch.attention, batch.keep, batch.documents, batch.order):
            digest.update(f"{tensor.dtype} {list(tensor.shape)}".encode() + tensor.contiguous().numpy().tobytes())
    assert digest.hexdigest()[:16] == "63c812c87e1977c5"


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("prepend_bos", [None, False, True])
def test_a_window_begins_with_bos_as_asked(tiny: ModuleType, adds: bool, prepend_bos: bool | None) -> None:
    tokenizer = tiny.word_tokenizer(bos=adds)
    tokenizer.bos_token = "<s>"
    config = dataclasses.replace(tiny.SMALL, prepend_bos=prepend_bos, mask_special=False)
    reader = LanguageModelSource(config, tiny.TEXT, held_out=0.0, loaded=(tiny.gpt2(), tokenizer))
    chunk = tiny.collect(reader, None)[0]
    has_bos = adds if prepend_bos is None else prepend_bos
    is_bos = tiny.need(chunk.token_ids) == 0
    assert torch.equal(is_bos, (tiny.need(chunk.position) == 0) & has_bos)
    masked = dataclasses.replace(config, mask_special=True)
    reader = LanguageModelSource(masked, tiny.TEXT, held_out=0.0, loaded=(reader._model.model, tokenizer))
    assert tiny.same(tiny.collect(reader, None)[0], chunk.select(~is_bos))


@pytest.mark.parametrize("mask_special", [False, True])
def test_a_text_that_begins_with_bos_gets_no_second_one(tiny: ModuleType, mask_special: bool) -> None:
    config = dataclasses.replace(tiny.SMALL, mask_special=mask_special)
    model = tiny.gpt2()
    chunks = [
        tiny.collect(tiny.source(config, open_text([text]), model=model, bos=True), None)[0]
        for text in ("the cat sat", "<s> the cat sat", "<s><s> the cat sat")
    ]
    assert tiny.same(chunks[0], chunks[1])
    assert tiny.same(chunks[0], chunks[2])
    without = tiny.collect(tiny.source(config, open_text(["<s> the cat"]), model=model, bos=False), None)[0]
    assert len(without.group) > 1


def test_tokens_marked_special_among_the_added_ones_are_masked(tiny: ModuleType) -> None:
    from tokenizers import AddedToken

    tokenizer = tiny.word_tokenizer()
    tokenizer.add_tokens([AddedToken("<turn>", special=True), AddedToken("plainly")])
    special, plain = (tokenizer.convert_tokens_to_ids(token) for token in ("<turn>", "plainly"))
    assert special not in tokenizer.all_special_ids
    text = open_text(["<turn> the cat plainly sat <turn> on a mat"])
    reader = LanguageModelSource(tiny.SMALL, text, held_out=0.0, loaded=(tiny.gpt2(), tokenizer))
    ids = tiny.need(tiny.collect(reader, None)[0].token_ids).tolist()
    assert special not in ids
    assert plain in ids
    assert len(ids) == 7


@pytest.mark.parametrize(
    ("changes", "bos", "message"),
    [
        ({"skip_first": 16}, False, "skip_first: expected fewer than the 16 tokens of an input"),
        ({"skip_first": -1}, False, "skip_first: expected a number that is not negative"),
        ({"exclude_ids": (99,)}, False, r"exclude_ids: the tokenizer has the ids 0 to \d+, got 99"),
        ({"exclude_ids": 1}, False, "exclude_ids: expected a list of whole numbers"),
        ({"exclude_ids": (-1,)}, False, "exclude_ids: expected a list of whole numbers"),
        ({"prepend_bos": True}, False, "prepend_bos: the tokenizer of this model has no BOS token"),
    ],
)
def test_settings_that_leave_no_token_are_refused(
    tiny: ModuleType, changes: dict[str, object], bos: bool, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny.source(dataclasses.replace(tiny.SMALL, **changes), bos=bos)


def test_skipping_all_but_what_is_added_at_the_end_is_refused(tiny: ModuleType) -> None:
    from tokenizers import processors

    tokenizer = tiny.word_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A there", special_tokens=[("there", tokenizer.convert_tokens_to_ids("there"))]
    )
    config = dataclasses.replace(tiny.SMALL, skip_first=15)
    with pytest.raises(ConfigError, match="skip_first: expected fewer than 15"):
        LanguageModelSource(config, tiny.TEXT, loaded=(tiny.gpt2(), tokenizer))


def test_a_padding_token_that_only_the_tokenizer_has_does_no_harm(tiny: ModuleType) -> None:
    tokenizer = tiny.word_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.pad_token_id = 64
    reader = LanguageModelSource(tiny.SMALL, tiny.TEXT, held_out=0.0, loaded=(tiny.gpt2(), tokenizer))
    plain = tiny.source(model=reader._model.model, held_out=0.0)
    assert tiny.same(*(tiny.collect(source, None)[0] for source in (reader, plain)))


def test_a_token_that_the_model_does_not_know_is_named(tiny: ModuleType) -> None:
    tokenizer = tiny.word_tokenizer()
    tokenizer.add_tokens([f"new{i}" for i in range(60)])
    reader = LanguageModelSource(tiny.SMALL, open_text(["the new50 cat"]), loaded=(tiny.gpt2(), tokenizer))
    with pytest.raises(
        DataError, match=r"document 0 has the token 6\d \('new50'\), and the model knows the ids 0 to 63"
    ):
        tiny.collect(reader, None)
