"""Activations of a loaded model: batches by site, what they train, and what is refused."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch

import flashsae
from flashsae.errors import ConfigError, DtypeError
from flashsae.settings.reading import ReadingConfig
from helpers.tiny_models import DOCUMENTS

SMALL = {"context_length": 16, "forward_tokens": 64}
TRAINING: dict[str, Any] = {"d_sae": 32, "k": 4, "batch_tokens": 64, "shuffle_tokens": 256, "progress": False}


def of(tiny: ModuleType, hookpoint: Any = "h.1", **settings: Any) -> Any:
    model = tiny.gpt2()
    return flashsae.activations(model, tiny.word_tokenizer(), DOCUMENTS, hookpoint=hookpoint, **{**SMALL, **settings})


def test_batches_by_site_are_hidden_states(tiny: ModuleType) -> None:
    model, tokenizer = tiny.gpt2().eval(), tiny.word_tokenizer()
    found = list(flashsae.activations(model, tokenizer, DOCUMENTS[:1], hookpoint=["h.0", "h.1:in"], **SMALL))
    ids = torch.tensor([tokenizer(DOCUMENTS[0])["input_ids"]])
    expected = model(ids, output_hidden_states=True).hidden_states[1][0]
    assert len(found) == 1
    assert list(found[0]) == ["h.0", "h.1:in"]
    for acts in found[0].values():
        torch.testing.assert_close(acts, expected, rtol=0, atol=1e-5)


def test_held_out_texts_are_left_out_and_can_be_had(tiny: ModuleType) -> None:
    every, acts = of(tiny), of(tiny, held_out=0.3)
    train, held_out = (sum(len(batch["h.1"]) for batch in part) for part in (acts, acts.held_out))
    assert min(train, held_out) > 0
    assert train + held_out == sum(len(batch["h.1"]) for batch in every)
    assert not list(every.held_out)


def test_they_train_an_sae_that_resumes_and_is_evaluated(tiny: ModuleType, tmp_path: Any) -> None:
    acts = of(tiny, held_out=0.3)
    sae = flashsae.fit(acts, tokens=64 * 30, run=tmp_path / "run", **TRAINING)
    assert 0 < flashsae.evaluate(sae, acts.held_out).fvu < 1
    again = flashsae.fit(of(tiny, held_out=0.3), tokens=64 * 30, run=tmp_path / "run", resume=True, **TRAINING)
    assert torch.equal(sae.W_dec, again.W_dec)
    named = flashsae.train(
        tiny.gpt2(),
        tiny.word_tokenizer(),
        DOCUMENTS,
        hookpoint="h.1",
        held_out=0.3,
        tokens=64 * 30,
        **SMALL,
        **TRAINING,
    )
    assert torch.equal(sae.W_dec, named.W_dec)


def test_a_transcoder_takes_two_hookpoints(tiny: ModuleType) -> None:
    acts = of(tiny, ["h.1.mlp:in", "h.1.mlp"])
    sae = flashsae.fit(acts, arch="transcoder", tokens=64 * 3, **TRAINING)
    assert flashsae.evaluate(sae, acts).tokens > 0


def test_a_source_trains_too(tiny: ModuleType) -> None:
    acts = of(tiny)
    one, other = (flashsae.fit(each, tokens=64 * 4, **TRAINING) for each in (acts, acts.source))
    assert torch.equal(one.W_dec, other.W_dec)


def test_reading_and_training_share_no_setting() -> None:
    from dataclasses import fields

    assert not {f.name for f in fields(ReadingConfig)} & {f.name for f in fields(flashsae.TrainConfig)}


def test_what_is_refused(tiny: ModuleType) -> None:
    with pytest.raises(ConfigError, match=r"contextlength: no such setting beside a model; there are .*context_length"):
        of(tiny, contextlength=3)
    with pytest.raises(DtypeError, match="model: expected a module or a name, got dict"):
        flashsae.activations({}, None, DOCUMENTS, hookpoint="h.0")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="tokenizer: expected that of the model, got None"):
        flashsae.activations(tiny.gpt2(), None, DOCUMENTS, hookpoint="h.0")
    with pytest.raises(ConfigError, match="tokens: expected a number"):
        flashsae.fit(of(tiny), **TRAINING)
