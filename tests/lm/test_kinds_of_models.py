"""Every kind of model is read at the outputs and inputs of its modules, and runs no further than it has to."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from flashsae.data.language_model import LanguageModelSource
from flashsae.errors import ConfigError
from flashsae.lm.parts import bare
from flashsae.text.open import open_text
from helpers.kinds import KINDS

DOCUMENTS = ["the cat sat on a mat", "a mat", "then it went out to see", "there"]


def read(tiny: ModuleType, kind: str, hookpoint: str, model: nn.Module, documents: list[str]) -> LanguageModelSource:
    config = replace(tiny.SMALL, hookpoint=hookpoint, side=KINDS[kind].side, forward_tokens=128)
    source: LanguageModelSource = tiny.source(config, open_text(documents), model=model, held_out=0.0)
    return source


def rows(tiny: ModuleType, source: LanguageModelSource) -> list[Tensor]:
    return list(tiny.collect(source, None)[0].acts.values())


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_read_and_stops(tiny: ModuleType, kind: str) -> None:
    each = KINDS[kind]
    model = each.make()
    ran: list[str] = []
    bare(model).get_submodule(each.behind).register_forward_hook(lambda *_: ran.append(each.behind))
    asked = f"{each.hookpoint}, {each.hookpoint}:in" + (f", {each.given_by}" if each.given_by else "")
    source = read(tiny, kind, asked, model, DOCUMENTS)
    assert set(source.widths.values()) == {each.width}
    output, given, *before = rows(tiny, source)
    assert ran == []
    assert output.shape == given.shape == (15, each.width)
    assert not torch.equal(output, given)
    assert all(torch.equal(given, other) for other in before)
    one_by_one = [rows(tiny, read(tiny, kind, each.hookpoint, model, [text]))[0] for text in DOCUMENTS]
    # padding, and what stands beside a text, is nothing to it
    torch.testing.assert_close(output, torch.cat(one_by_one), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["t5 decoder", "bart decoder", "fsmt decoder"])
def test_a_decoder_reads_the_text_behind_its_start_token(tiny: ModuleType, kind: str) -> None:
    model = KINDS[kind].make().eval()
    source = read(tiny, kind, KINDS[kind].hookpoint, model, DOCUMENTS[:1])
    ids = torch.tensor([source.tokenizer(DOCUMENTS[0])["input_ids"]])
    start = torch.tensor([[model.config.decoder_start_token_id]])
    with torch.no_grad():
        states = model(
            input_ids=torch.tensor([[model.config.eos_token_id]]),
            decoder_input_ids=torch.cat([start, ids], 1),
            output_hidden_states=True,
            use_cache=False,
        ).decoder_hidden_states[1]
    torch.testing.assert_close(rows(tiny, source)[0], states[0, 1:], rtol=1e-5, atol=1e-5)


def test_a_decoder_has_room_for_its_start_token(tiny: ModuleType) -> None:
    model = KINDS["bart decoder"].make()
    config = replace(tiny.SMALL, hookpoint="decoder.layers.0", side="decoder", forward_tokens=128)
    tiny.source(replace(config, context_length=31), model=model)
    with pytest.raises(ConfigError, match="context_length: tiny reads at most 31 tokens, got 32"):
        tiny.source(replace(config, context_length=32), model=model)


@pytest.mark.parametrize(
    ("kind", "hookpoint", "message"),
    [
        ("t5 encoder", "decoder.block.0", "choose a module of encoder, which does, or give --side decoder"),
        ("t5 decoder", "encoder.block.0", "choose a module of decoder, which does, or give --side encoder"),
        ("mixtral", "layers.0.mlp.gate", r"a router and experts have.*; choose layers\.0\.mlp, which is around it"),
        ("mixtral", "layers.0.mlp.experts", r"a router and experts have.*; choose layers\.0\.mlp, which is around it"),
        ("mixtral", "layers.0.mlp.experts:in", r"expected an input.*; choose layers\.0\.mlp, which is around it"),
        ("qwen2_moe", "layers.1.mlp.shared_expert", r"a router and experts have.*choose layers\.1\.mlp, which is"),
        ("olmoe", "layers.1.mlp.gate", r"a router and experts have.*; choose layers\.1\.mlp, which is around it"),
        ("llava", "vision_tower.encoder.layers.0", r"did not run when.*such as language_model\.layers\.1"),
        ("gemma3", "multi_modal_projector", r"did not run when.*such as language_model\.layers\.1"),
        ("bart decoder", "decoder:in", "given a tensor in its place, or as hidden_states, got decoder with"),
        ("clip", "vision_model.encoder.layers.0", "choose a module of text_model, which does"),
        ("mamba", "layers.1.mixer.conv1d", r"choose layers\.1\.mixer, which is around it"),
    ],
)
def test_what_gives_no_vector_for_each_token_says_what_to_choose(
    tiny: ModuleType, kind: str, hookpoint: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read(tiny, kind, hookpoint, KINDS[kind].make(), DOCUMENTS)
    assert "\n" not in str(caught.value)


def test_a_side_needs_two(tiny: ModuleType) -> None:
    with pytest.raises(ConfigError, match="side: GPT2Model has no encoder beside a decoder; leave side out"):
        tiny.source(replace(tiny.SMALL, side="decoder"))


def test_the_path_of_the_language_model_may_be_left_out(tiny: ModuleType) -> None:
    short = read(tiny, "llava", "layers.*", KINDS["llava"].make(), DOCUMENTS)
    assert short.hookpoints == ("language_model.layers.0", "language_model.layers.1")
    assert read(tiny, "t5 decoder", "block.1", KINDS["t5 decoder"].make(), DOCUMENTS).hookpoints == ("decoder.block.1",)
