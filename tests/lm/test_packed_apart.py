"""Documents that share an input give what they give alone, where they are packed apart."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from types import ModuleType
from typing import Any

import pytest
import torch

from flashsae.data.language_model import LanguageModelSource
from flashsae.errors import ConfigError
from flashsae.lm.windows import TokenBatch, positions_in_documents
from flashsae.text.reading_order import Place


def source(tiny: ModuleType, family: str, **settings: Any) -> LanguageModelSource:
    lm = tiny.MORE_FAMILIES.get(family, tiny.bert)()
    hookpoint = next(name for name, _ in lm.named_modules() if name.endswith(".1"))
    return tiny.source(replace(tiny.CACHED, hookpoint=hookpoint, **settings), model=lm)


def pieces(batch: TokenBatch) -> Iterator[tuple[int, slice]]:
    """Yield the rows of inputs and where in them the tokens of each document stand."""
    for row, (documents, attention) in enumerate(zip(batch.documents, batch.attention)):
        places = range(int(attention.sum()))
        for _, group in groupby(places, key=lambda place, of=documents: int(of[place])):
            found = list(group)
            yield row, slice(found[0], found[-1] + 1)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_packed_documents_give_what_they_give_alone(tiny: ModuleType, family: str) -> None:
    apart, together = (source(tiny, family, pack=True, pack_apart=each) for each in (True, False))
    model = apart._model
    (name,) = model.hookpoints
    chunks = {each: [chunk for chunk, _ in each.chunks(None)] for each in (apart, together)}
    n_behind = n_leaks = 0
    batches = [batch for block, _, _ in apart._batched_blocks(None, Place(0, 0)) for batch in block]
    for batch, chunk, leaky in zip(batches, chunks[apart], chunks[together], strict=True):
        expected = torch.zeros(*batch.ids.shape, 16)
        for row, piece in pieces(batch):
            ids = batch.ids[row : row + 1, piece]
            expected[row, piece] = model(ids, torch.ones_like(ids))[name][0]
        is_behind = positions_in_documents(batch) != torch.arange(batch.ids.shape[1])
        torch.testing.assert_close(chunk.acts[name], expected[batch.keep], rtol=0, atol=2e-5)
        n_behind += int((is_behind & batch.keep).sum())
        n_leaks += int(((leaky.acts[name] - expected[batch.keep]).abs().amax(1) > 2e-5).sum())
    assert n_behind > 50
    assert n_leaks > 50


@pytest.mark.parametrize("family", ["bert", "roberta", "opt", "bloom"])
def test_a_model_whose_documents_see_each_other_all_the_same_is_refused(tiny: ModuleType, family: str) -> None:
    sentence = r"^pack_apart: .*(see each other at|cannot be told where a document begins).* Leave it out"
    with pytest.raises(ConfigError, match=sentence):
        source(tiny, family, pack=True, pack_apart=True)


def test_positions_begin_with_each_document_and_padding_has_none() -> None:
    documents = torch.tensor([[4, 4, 4, 7, 7, 9], [9, 9, 9, 9, 9, 9]])
    attention = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    batch = TokenBatch(documents, attention, attention.bool(), documents, torch.arange(2))
    assert positions_in_documents(batch).tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 0, 0]]


def test_it_is_of_packed_documents_alone(tiny: ModuleType) -> None:
    with pytest.raises(ConfigError, match=r"^pack_apart: expected --pack beside it"):
        replace(tiny.CACHED, pack_apart=True)


def test_the_plan_says_so_and_a_cache_of_the_other_kind_has_another_name(tiny: ModuleType) -> None:
    apart, together = (source(tiny, "llama", pack=True, pack_apart=each) for each in (True, False))
    assert "documents packed, each as if it stood alone" in apart.inputs_in_words()
    assert "as if it stood alone" not in together.inputs_in_words()
    assert apart.fingerprint != together.fingerprint
    assert "pack_apart" not in together.identity
