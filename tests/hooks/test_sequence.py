"""Models of many kinds: where in a text they read, with which cache, and in which form they give activations."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flashsae import SAE, clamp, hook, steer
from flashsae.errors import ConfigError
from helpers.hooked import SIZES, at_hookpoint


def decoder(family: str) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")
    sizes = {**SIZES, "num_key_value_heads": 2, "max_position_embeddings": 64}
    more = {
        "Mamba": {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},
        "T5": {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0},
        "Gemma3": {**sizes, "head_dim": 8, "sliding_window": 4},
    }.get(family, sizes)
    if family == "Gemma3":
        config = transformers.Gemma3TextConfig
    kind = "ForConditionalGeneration" if family == "T5" else "ForCausalLM"
    made: nn.Module = getattr(transformers, family + kind)(config(vocab_size=64, **more)).eval()
    made.generation_config.eos_token_id = None  # type: ignore[union-attr]
    made.generation_config.pad_token_id = 0  # type: ignore[union-attr]
    return made


@pytest.mark.parametrize(
    ("family", "hookpoint", "wanted"),
    [
        ("Llama", "layers.1", [0] * 7 + [1] * 3),
        ("Llama", "layers.1.mlp:in", [0] * 7 + [1] * 3),
        ("Gemma3", "layers.1", [0] * 7 + [1] * 3),
        ("Mamba", "layers.1", [0] * 7 + [1] * 3),
        ("T5", "decoder.block.1", [0, 1, 1, 1]),
        ("T5", "block.1", [0] * 7),
    ],
)
def test_new_tokens_of_many_families(family: str, hookpoint: str, wanted: list[int], ids: Tensor, sae: SAE) -> None:
    part = decoder(family)
    with hook(part, {hookpoint: sae}, clamp(5, 9.0, at="new")) as codes:
        part.generate(ids, max_new_tokens=4, do_sample=False)
    assert (codes.edited[hookpoint].to_dense()[1, :, 5] == 9).int().tolist() == wanted


@pytest.mark.parametrize(
    "settings", [{"num_beams": 3}, {"cache_implementation": "static"}, {"do_sample": True, "num_return_sequences": 2}]
)
def test_ways_to_generate(settings: dict[str, Any], model: nn.Module, ids: Tensor, sae: SAE) -> None:
    with hook(model, {"h.1": sae}, clamp(5, 9.0, at="new")) as codes:
        model.generate(ids, max_new_tokens=4, **settings)
    assert (codes.edited["h.1"].to_dense()[0, :, 5] == 9).int().tolist() == [0] * 7 + [1] * 3


def test_without_a_cache_positions_are_told_or_refused(model: nn.Module, ids: Tensor, sae: SAE) -> None:
    def texts(at: Any, **settings: Any) -> Tensor:
        with hook(model, {"h.1": sae}, steer(5, 9.0, at=at)):
            found: Tensor = model.generate(ids, max_new_tokens=4, do_sample=False, **settings)
            return found

    assert torch.equal(texts(slice(7, None), use_cache=False), texts("new"))
    for at in ("new", "prompt", -1, slice(-2, None)):
        with pytest.raises(ConfigError, match="where the prompt ends is known where a key-value cache is used, but"):
            texts(at, use_cache=False)


def test_assisted_generation(model: nn.Module, tiny: ModuleType, ids: Tensor, sae: SAE) -> None:
    assistant = tiny.gpt2(layers=1).eval()
    assistant.generation_config.eos_token_id = None

    def text(at: Any, **settings: Any) -> tuple[Tensor, Any]:
        with hook(model, {"h.1": sae}, steer(5, 9.0, at=at)) as codes:
            return model.generate(ids[:1], max_new_tokens=8, do_sample=False, **settings), codes

    wanted, _ = text("new")
    found, codes = text(slice(7, None), assistant_model=assistant)
    assert torch.equal(found, wanted)
    assert len(codes.forwards("h.1")) > 1
    with pytest.raises(ConfigError, match=r"h\.1: the model took back some tokens that it had read"):
        codes["h.1"]
    with pytest.raises(ConfigError, match="where the prompt ends is not known in assisted generation"):
        text("new", assistant_model=assistant)


def test_padding_on_the_left(model: nn.Module, ids: Tensor, sae: SAE) -> None:
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.int64), ids], dim=1)
    mask = (padded > 0).long()
    with hook(model, {"h.1": sae}, steer(5, 9.0, at=-1)):
        wanted = model.generate(ids, max_new_tokens=3, do_sample=False)
    with hook(model, {"h.1": sae}, steer(5, 9.0, at=-1)):
        found = model.generate(padded, attention_mask=mask, max_new_tokens=3, do_sample=False)
    assert torch.equal(found[:, 10:], wanted[:, 7:])
    with hook(model, {"h.1": sae}, clamp(5, 9.0, at=mask.bool())) as codes:
        model(padded, attention_mask=mask)
    assert torch.equal(codes.edited["h.1"].to_dense()[..., 5] == 9, mask.bool())


def test_models_of_both_directions_and_of_images(tiny: ModuleType, sae: SAE) -> None:
    bert, vit = tiny.bert().eval(), tiny.MORE_FAMILIES["vit"]().eval()
    ids = torch.randint(3, 60, (2, 7))
    with hook(bert, {"encoder.layer.*": sae}, {"encoder.layer.0": steer(5, 9.0, at=0)}) as codes:
        changed = bert(ids).last_hidden_state
    assert codes["encoder.layer.1"].shape == (2, 7)
    assert not torch.equal(changed, bert(ids).last_hidden_state)
    with hook(vit, {"encoder.layer.0": sae}, clamp(5, 9.0, at=0)) as codes:
        vit(pixel_values=torch.rand(2, 3, 8, 8))
    assert (codes.edited["encoder.layer.0"].to_dense()[0, :, 5] == 9).int().tolist() == [1, 0, 0, 0, 0]


def test_a_module_that_runs_for_each_layer_is_meant_once(sae: SAE) -> None:
    from transformers import AlbertConfig, AlbertModel

    albert = AlbertModel(AlbertConfig(vocab_size=64, embedding_size=8, **{**SIZES, "num_hidden_layers": 3})).eval()
    ids, name = torch.randint(3, 60, (2, 7)), "encoder.albert_layer_groups.0.albert_layers.0"
    x = at_hookpoint(albert, name, ids)
    with hook(albert, {name: sae}, steer(5, 2.0)) as codes:
        found = at_hookpoint(albert, name, ids)
    torch.testing.assert_close(found, x + 2 * sae.W_dec[5].detach())
    assert torch.equal(codes[name].to_dense(), sae.encode(x).to_dense())


class Outputs(nn.Module):
    """Gives activations in a form that a test asks for."""

    def __init__(self, form: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.part, self.form = nn.Identity(), form
        self.part.forward = form  # type: ignore[method-assign]

    def forward(self, x: Tensor) -> Any:
        return self.part(x)


def test_outputs_of_many_forms(sae: SAE) -> None:
    from collections import namedtuple

    from transformers.modeling_outputs import BaseModelOutput

    pair = namedtuple("pair", "acts weights")
    x = torch.randn(2, 5, 16)
    forms: list[Callable[[Tensor], Any]] = [
        lambda x: x,
        lambda x: (x, None, 3),
        lambda x: [None, x],
        lambda x: pair(x, "w"),
        lambda x: {"first": None, "acts": x},
        lambda x: BaseModelOutput(last_hidden_state=x, attentions=(x,)),
    ]
    for form in forms:
        module = Outputs(form)
        with hook(module, {"part": sae}, error=False):
            found = module(x)
        wanted = form(sae(x).detach())
        assert type(found) is type(wanted)
        if isinstance(wanted, dict):
            assert list(found) == list(wanted)
            found, wanted = tuple(found.values()), tuple(wanted.values())
        if isinstance(wanted, Tensor):
            found, wanted = [found], [wanted]
        for one, other in zip(found, wanted):
            assert torch.equal(one, other) if isinstance(other, Tensor) else type(one) is type(other)
    assert torch.equal(found[1][0], x)  # the others stay
    module = Outputs(lambda x: frozenset([x]))
    with (
        pytest.raises(ConfigError, match="nothing can be put into the frozenset that part gives"),
        hook(module, {"part": sae}, error=False),
    ):
        module(x)
    module = Outputs(lambda x: 3)
    with pytest.raises(ConfigError, match="part gives no tensor but int"), hook(module, {"part": sae}):
        module(x)


def test_heads_and_positions_in_other_places(sae: SAE) -> None:
    x = torch.randn(2, 5, 16)
    heads = Outputs(lambda x: x.unflatten(-1, (4, 4)))
    with hook(heads, {"part": sae}, clamp(3, 9.0, at=1)) as codes:
        found = heads(x)
    assert found.shape == (2, 5, 4, 4)
    assert (codes.edited["part"].to_dense()[0, :, 3] == 9).int().tolist() == [0, 1, 0, 0, 0]
