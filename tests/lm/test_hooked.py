"""What can be read of models of many families, and one sentence for each that cannot, before anything is made."""

from __future__ import annotations

import dataclasses
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from flashsae.errors import ConfigError
from flashsae.lm.hooked import HookedModel
from flashsae.lm.hookpoints import resolve_hookpoints
from flashsae.lm.parts import context_limit, text_reader
from flashsae.text.open import open_text

TEXT = open_text(["the cat sat on a mat"] * 3)


def read(tiny: ModuleType, family: str, hookpoint: str, context_length: int = 16) -> Any:
    config = dataclasses.replace(tiny.SMALL, hookpoint=hookpoint, context_length=context_length, forward_tokens=128)
    return tiny.source(config, TEXT, model=tiny.MORE_FAMILIES[family](), held_out=0.0)


@pytest.mark.parametrize(
    ("family", "hookpoint"),
    [
        ("opt", "decoder.layers.1"),
        ("bloom", "h.1"),
        ("gpt_neox", "layers.1"),
        ("roberta", "encoder.layer.1"),
        ("t5", "encoder.block.1"),
        ("t5", "encoder.block.0.layer.1"),
        ("bart", "encoder.layers.1"),
        ("clip", "text_model.encoder.layers.1"),
    ],
)
def test_every_token_of_many_families_is_read(tiny: ModuleType, family: str, hookpoint: str) -> None:
    reader = read(tiny, family, hookpoint)
    assert reader.widths == {hookpoint: 16}
    assert len(tiny.collect(reader, None)[0].acts[hookpoint]) == 18


@pytest.mark.parametrize(
    ("family", "hookpoint", "message"),
    [
        ("t5", "decoder.block.1", r"decoder\.block\.1 does not read text alone in T5Model; choose a module of encoder"),
        ("t5", "decoder", "decoder does not read text alone"),
        ("bart", "decoder.layers.0", "choose a module of encoder"),
        ("clip", "vision_model.encoder.layers.0", "choose a module of text_model"),
        ("whisper", "encoder.layers.0", "WhisperModel reads input_features, not text"),
        ("whisper", "decoder.layers.0", "WhisperModel reads input_features, not text"),
        ("vit", "embeddings", "ViTModel reads pixel_values, not text"),
    ],
)
def test_what_reads_no_text_is_refused(tiny: ModuleType, family: str, hookpoint: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read(tiny, family, hookpoint)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("family", "hookpoint"), [("gpt2", "wpe"), ("llama", "rotary_emb"), ("opt", "decoder.embed_positions")]
)
def test_positions_are_no_activations(tiny: ModuleType, family: str, hookpoint: str) -> None:
    with pytest.raises(ConfigError, match=f"depends on the tokens, got from {hookpoint} the same for every sequence"):
        read(tiny, family, hookpoint)


class Odd(nn.Module):
    """Gives what a test asks for, of inputs [sequences, length]."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, hidden: torch.Tensor) -> Any:
        ids = hidden[..., 0].long()
        return {
            "int": 3,
            "None": None,
            "empty tuple": (),
            "nested": ((hidden,),),
            "ids": torch.stack([ids, ids], -1),
            "flat": hidden.flatten(0, 1),
            "heads": hidden[:, None],
            "first token": hidden[:, :1],
            "tuple": (hidden, 3),
            "dict": {"a": hidden},
            "expanded positions": torch.arange(hidden.shape[1])[None, :, None].expand(2, -1, 4).float(),
        }[self.kind]


class WithOdd(nn.Module):
    """Embeds, runs an odd module and ends."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.embed, self.odd = nn.Embedding(64, 8), Odd(kind)
        self.config = SimpleNamespace(is_encoder_decoder=False)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(input_ids)
        self.odd(hidden)
        return torch.as_tensor(hidden)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("int", "odd gives no tensor but int"),
        ("None", "odd gives no tensor but NoneType"),
        ("empty tuple", "odd gives no tensor but tuple"),
        ("nested", "odd gives no tensor but tuple"),
        ("ids", r"got \[1, 16, 2\] of torch\.int64 from odd"),
        ("flat", r"got \[32, 8\] of torch\.float32 from odd"),
        ("heads", r"got \[1, 1, 16, 8\]"),
        ("first token", r"got \[1, 1, 8\]"),
        ("expanded positions", "depends on the tokens, got from odd the same"),
    ],
)
def test_other_outputs_are_refused_in_one_sentence(tiny: ModuleType, kind: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        tiny.source(dataclasses.replace(tiny.SMALL, hookpoint="odd"), TEXT, model=WithOdd(kind))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["tuple", "dict"])
def test_the_first_tensor_of_several_is_taken(tiny: ModuleType, kind: str) -> None:
    assert tiny.source(dataclasses.replace(tiny.SMALL, hookpoint="odd"), TEXT, model=WithOdd(kind)).d_in == 8


@pytest.mark.parametrize(
    ("family", "limit"), [("roberta", 32), ("bart", 32), ("opt", 32), ("clip", 32), ("gpt2", 32), ("llama", 32)]
)
def test_the_limit_of_the_context_is_that_of_the_model(tiny: ModuleType, family: str, limit: int) -> None:
    hookpoint = {"gpt2": "h.1", "llama": "layers.1", "opt": "decoder.layers.1", "roberta": "encoder.layer.1"}
    hookpoint |= {"bart": "encoder.layers.1", "clip": "text_model.encoder.layers.1"}
    read(tiny, family, hookpoint[family], limit)
    with pytest.raises(ConfigError, match=f"context_length: tiny reads at most {limit} tokens, got {limit + 1}"):
        read(tiny, family, hookpoint[family], limit + 1)


def test_a_model_without_a_limit_is_read_at_any_length(tiny: ModuleType) -> None:
    assert context_limit(tiny.MORE_FAMILIES["bloom"](), SimpleNamespace(model_max_length=None)) == float("inf")
    read(tiny, "bloom", "h.1", 100)
    read(tiny, "t5", "encoder.block.1", 100)


def test_a_limit_that_no_setting_tells_is_found_before_anything_is_made(tiny: ModuleType) -> None:
    model = tiny.gpt2().base_model
    model.config = SimpleNamespace(is_encoder_decoder=False)
    with pytest.raises(ConfigError, match=r"tiny cannot read 40 tokens of text \(\w+: .*\)\. Try a smaller context"):
        tiny.source(dataclasses.replace(tiny.SMALL, context_length=40), TEXT, model=model)


def test_a_model_that_pads_its_input_is_refused(tiny: ModuleType) -> None:
    model = tiny._make("Longformer", vocab_size=64, attention_window=[4, 4], max_position_embeddings=34, **tiny._SIZES)
    reader = tiny.source(dataclasses.replace(tiny.SMALL, hookpoint="encoder.layer.1"), TEXT, model=model)
    with pytest.raises(ConfigError, match=r"gives \[3, 8\] vectors for \[3, 6\] tokens, as models do that pad"):
        tiny.collect(reader, None)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_give_no_finite_numbers_are_refused_at_the_first_look(tiny: ModuleType, value: float) -> None:
    for name in ("wte.weight", "h.1.mlp.c_proj.weight", "h.1.mlp.c_proj.bias"):
        model = tiny.gpt2()
        with torch.no_grad():
            model.base_model.get_parameter(name)[:] = value
        with pytest.raises(ConfigError, match=r"^model: tiny gives NaN or Inf at h\.1 whatever it reads") as caught:
            tiny.source(dataclasses.replace(tiny.SMALL, hookpoint="h.1"), TEXT, model=model)
        assert "\n" not in str(caught.value)
    tiny.source(dataclasses.replace(tiny.SMALL, hookpoint="h.0"), TEXT, model=model)  # an earlier one is sound


def test_the_whole_model_reads_where_it_has_one_half() -> None:
    model = nn.Linear(2, 2)
    assert text_reader(model) is model


@pytest.mark.parametrize(
    ("family", "hookpoint", "same_as"),
    [
        ("gpt2", "h.1:in", "h.0"),
        ("gpt2", "h.1.mlp:in", "h.1.ln_2"),
        ("gpt2", "h.1.mlp.c_proj:in", "h.1.mlp.act"),
        ("llama", "layers.1:in", "layers.0"),
        ("llama", "layers.1.mlp:in", "layers.1.post_attention_layernorm"),
        ("llama", "layers.1.self_attn:in", "layers.1.input_layernorm"),  # given as hidden_states=
        ("gpt_neox", "layers.1.mlp:in", "layers.1.post_attention_layernorm"),
        ("t5", "encoder.block.1:in", "encoder.block.0"),
    ],
)
def test_the_input_of_a_module_is_the_output_of_the_one_before(
    tiny: ModuleType, family: str, hookpoint: str, same_as: str
) -> None:
    model = tiny.MORE_FAMILIES[family]()
    config = dataclasses.replace(tiny.SMALL, forward_tokens=128)
    alone, both = (
        tiny.collect(tiny.source(config, TEXT, hookpoints=sites, model=model), None)[0]
        for sites in ((hookpoint,), (hookpoint, same_as))
    )
    assert list(both.acts) == [hookpoint, same_as]
    assert len(both.group) > 0
    assert torch.equal(both.acts[hookpoint], both.acts[same_as])
    assert torch.equal(alone.acts[hookpoint], both.acts[hookpoint])


@pytest.mark.parametrize(
    ("hookpoints", "expected"),
    [
        (("h.1:in",), ["h.0"]),
        (("h.1.mlp:in",), ["h.0"]),
        (("h.1:in", "h.0"), ["h.0"]),
        (("h.1", "h.1.mlp:in"), ["h.0", "h.1"]),
        (("h.*:in",), ["h.0", "h.1"]),
    ],
)
def test_the_forward_stops_before_a_module_whose_input_is_all_that_is_needed(
    tiny: ModuleType, hookpoints: tuple[str, ...], expected: list[str]
) -> None:
    model = tiny.gpt2().base_model
    ran: list[str] = []
    for number, layer in enumerate(model.h):
        layer.register_forward_hook(lambda *_, number=number: ran.append(f"h.{number}"))
    hooked = HookedModel(model, resolve_hookpoints(model, hookpoints))
    outputs = hooked(torch.arange(4)[None], torch.ones(1, 4, dtype=torch.int64))
    assert ran == expected
    assert tuple(outputs) == hooked.hookpoints
    assert not any(module._forward_hooks for name, module in model.named_modules() if not name.startswith("h."))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_an_input_that_is_changed_in_place_later_is_kept_as_it_was(tiny: ModuleType) -> None:
    def add_in_place(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        args[0].add_(1.0)

    model = tiny.gpt2()
    config = dataclasses.replace(tiny.SMALL, hookpoint="h.0")
    expected = tiny.collect(tiny.source(config, TEXT, model=model), None)[0]
    model.base_model.h[1].ln_1.register_forward_pre_hook(add_in_place)
    found = tiny.collect(tiny.source(config, TEXT, hookpoints=("h.1:in", "h.2"), model=model), None)[0]
    assert torch.equal(found.acts["h.1:in"], expected.acts["h.0"])


@pytest.mark.parametrize(
    ("family", "hookpoint", "message"),
    [
        ("gpt2", "wte:in", r"expected an input of shape \[sequences, length, d\], got .* of torch\.int64 from wte:in"),
        ("gpt2", "wpe:in", "expected an input"),
        ("gpt2", "h.1.attn.attn_dropout:in", r"h\.1\.attn\.attn_dropout:in did not run"),
        ("roberta", "embeddings:in", "given a tensor in its place, or as hidden_states, got embeddings with input_ids"),
        ("t5", "decoder.block.1:in", r"decoder\.block\.1:in does not read text alone"),
    ],
)
def test_inputs_that_are_no_activations_are_refused_in_one_sentence(
    tiny: ModuleType, family: str, hookpoint: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read(tiny, family, hookpoint)
    assert "\n" not in str(caught.value)


def test_a_device_without_a_number_is_the_one_that_the_weights_lie_on(tiny: ModuleType) -> None:
    for device in (None, torch.device("cpu"), torch.device("cpu", 0)):
        hooked = HookedModel(tiny.gpt2(), ("transformer.h.0",), device=device)
        assert hooked.device == tiny.gpt2().device
        assert hooked.is_plain
