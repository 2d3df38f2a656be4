"""Weights that a hookpoint needs were loaded, or one sentence says which were not; what it does not need may differ."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flashsae.data.language_model import LanguageModelSource
from flashsae.errors import ConfigError
from flashsae.lm import adapters
from flashsae.lm.loading import load_language_model
from flashsae.lm.weights import Trace
from flashsae.settings.reading import ReadingConfig
from flashsae.text.open import open_text

Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def save(tiny: ModuleType, folder: Path, model: nn.Module, change: Change | None = None, **settings: Any) -> Path:
    """Save a model with a tokenizer, change its weights, and its config."""
    model.save_pretrained(folder)  # type: ignore[operator]
    tiny.word_tokenizer().save_pretrained(folder)
    weights = folder / "model.safetensors"
    if change is not None:
        save_file(change(load_file(weights)), weights, metadata={"format": "pt"})
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | settings))
    return folder


def read(folder: Path, hookpoint: str) -> LanguageModelSource:
    config = ReadingConfig(str(folder), hookpoint=hookpoint, context_length=16, forward_tokens=64)
    return LanguageModelSource(config, open_text(["the cat sat on a mat"] * 2), held_out=0.0, device="cpu")


def without(part: str) -> Change:
    return lambda weights: {name: tensor for name, tensor in weights.items() if part not in name}


def renamed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"backbone.{name}": tensor for name, tensor in weights.items()}


def narrow(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return weights | {"h.1.mlp.c_fc.weight": weights["h.1.mlp.c_fc.weight"][:, :8].contiguous()}


@pytest.mark.parametrize(
    ("change", "settings", "good", "bad", "message"),
    [
        (renamed, {}, None, "h.0", r"it lacks h\.0\.attn\.c_attn\.bias.* and 11 more"),
        (renamed, {}, None, "wte", r"it lacks wte\.weight"),
        (without("h.1."), {}, "h.0", "h.1", r"it lacks h\.1\.attn\.c_attn\.bias"),
        (without("h.1."), {}, "h.0.mlp", "ln_f", r"it lacks h\.1\.attn"),
        (without("h.1.ln_1"), {}, "h.0", "h.1.ln_1", r"it lacks h\.1\.ln_1\.bias, h\.1\.ln_1\.weight\."),
        (without("ln_f"), {}, "h.2", "ln_f", r"it lacks ln_f\.bias"),
        (without("h.1.ln_1"), {}, "h.1.ln_1:in", "h.1.attn:in", r"it lacks h\.1\.ln_1\.bias"),
        (without("h.1.mlp.c_proj"), {}, "h.1:in", "h.2:in", r"it lacks h\.1\.mlp\.c_proj"),
        (None, {"n_layer": 2}, "h.1:in", "ln_f:in", r"the model has no place for h\.2\.attn"),
        (narrow, {}, "h.1.attn", "h.1", r"of another shape are h\.1\.mlp\.c_fc\.weight"),
        (None, {"n_layer": 2}, "h.1", "ln_f", r"the model has no place for h\.2\.attn"),
        (None, {"n_layer": 4}, "h.2", "h.3", r"it lacks h\.3\.attn"),
    ],
)
def test_what_a_hookpoint_needs_must_have_come_from_the_checkpoint(
    tiny: ModuleType, tmp_path: Path, change: Change | None, settings: dict[str, Any], good: str, bad: str, message: str
) -> None:
    folder = save(tiny, tmp_path, tiny.gpt2().base_model, change, **settings)
    with pytest.raises(ConfigError, match=f"does not fit its architecture, so {bad}.*{message}") as caught:
        read(folder, bad)
    assert "\n" not in str(caught.value)
    if good is not None:
        assert read(folder, good).widths == {good: 16}


def test_what_the_model_has_no_place_for_is_refused_where_it_belongs_to_a_layer(
    tiny: ModuleType, tmp_path: Path
) -> None:
    more = {"layers.1.self_attn.q_proj.bias": torch.zeros(16), "layers.1.self_attn.q_norm.weight": torch.ones(8)}
    folder = save(tiny, tmp_path, tiny.llama(), lambda weights: weights | more)
    with pytest.raises(ConfigError, match=r"no place for layers\.1\.self_attn\.q_norm\.weight, layers\.1\.self_attn"):
        read(folder, "layers.1")
    assert read(folder, "layers.0").d_in == 16


def test_heads_poolers_and_buffers_behind_or_beside_are_no_alarm(
    tiny: ModuleType, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers import BertForMaskedLM

    neox = tiny.MORE_FAMILIES["gpt_neox"]()
    buffers = {"bias": torch.zeros(1, 1, 4, 4), "masked_bias": torch.zeros(1), "rotary_emb.inv_freq": torch.zeros(4)}
    old = {f"layers.0.attention.{name}": tensor for name, tensor in buffers.items()}
    position_ids = {"embeddings.position_ids": torch.arange(32)[None]}
    attention = {"h.0.attn.bias": torch.zeros(1, 1, 4, 4), "h.0.attn.masked_bias": torch.zeros(1)}
    cases: list[tuple[nn.Module, Change | None, str]] = [
        (tiny.gpt2(), None, "h.2"),
        (tiny.gpt2().base_model, None, "ln_f"),
        (tiny.gpt2().base_model, lambda weights: weights | attention, "h.1"),
        (BertForMaskedLM(tiny.bert().config), None, "encoder.layer.1"),
        (tiny.bert(), lambda weights: weights | position_ids, "encoder.layer.1"),
        (neox, lambda weights: weights | old, "layers.1"),
        (tiny.MORE_FAMILIES["t5"](), without("decoder.block"), "encoder.block.1"),
        (tiny.MORE_FAMILIES["clip"](), without("vision_model"), "text_model.encoder.layers.1"),
    ]
    caplog.clear()
    for number, (model, change, hookpoint) in enumerate(cases):
        folder = save(tiny, tmp_path / str(number), model, change)
        loaded = read(folder, hookpoint)
        given = tiny.source(loaded.config, loaded.text, model=model, held_out=0.0)
        ours, theirs = (tiny.collect(source, None)[0].acts[hookpoint] for source in (loaded, given))
        assert torch.equal(ours, theirs), hookpoint
    assert caplog.text == ""


def test_the_public_loader_does_not_mute_what_transformers_says_of_random_weights(
    tiny: ModuleType, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save(tiny, tmp_path, tiny.gpt2().base_model, without("h.1."))
    load_language_model(str(folder), torch.float32)
    assert "h.1." in caplog.text


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("model.safetensors", cut, r"could not load '.*' \(.*incomplete"),
        ("model.safetensors", Path.unlink, r"could not load '.*' \(.*no file named model\.safetensors"),
        ("config.json", Path.unlink, "could not load"),
        ("config.json", lambda path: path.write_text("{"), "could not load .*JSON"),
        ("config.json", lambda path: path.write_text("[]"), "could not load"),
        ("config.json", lambda path: path.write_text('{"model_type": "gpt2", "n_layer": "x"}'), "could not load"),
        ("tokenizer.json", lambda path: path.write_text("["), "has no tokenizer that can be read"),
        ("tokenizer.json", lambda path: path.write_text("{}"), "has no tokenizer that can be read"),
    ],
)
def test_damaged_and_missing_files_of_a_model_are_one_sentence(
    tiny: ModuleType, tmp_path: Path, file: str, damage: Callable[[Path], object], message: str
) -> None:
    folder = save(tiny, tmp_path, tiny.gpt2().base_model)
    damage(folder / file)
    with pytest.raises(ConfigError, match=message) as caught:
        read(folder, "h.1")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_a_model_without_a_tokenizer_is_refused(tiny: ModuleType, tmp_path: Path, name: str) -> None:
    model = tiny.FAMILIES[name][0]().base_model
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"has no tokenizer that can be read .*put the files of the tokenizer beside"):
        read(tmp_path, "h.1")


def test_an_adapter_needs_peft(tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "find_spec", lambda package: None)
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "gpt2", "peft_type": "LORA"}')
    with pytest.raises(ConfigError, match="holds an adapter, which only the package peft can read: pip install peft"):
        read(tmp_path, "h.1")


def test_the_home_folder_may_be_a_tilde(tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    save(tiny, tmp_path / "model", tiny.gpt2().base_model)
    (tmp_path / "text.txt").write_text("the cat\n\na mat")
    config = ReadingConfig("~/model", hookpoint="h.1", context_length=16, forward_tokens=64)
    assert LanguageModelSource(config, open_text("~/text.txt"), device="cpu").d_in == 16


def test_buffers_that_transformers_does_not_know_to_ignore_are_no_alarm(tiny: ModuleType) -> None:
    model = tiny.llama()
    ran = frozenset(model.layers[0].modules())
    trace = Trace(model, frozenset({model.layers[0]}), ran | {model}, ran)
    assert trace.lacks("layers.0.self_attn.q_norm.weight")
    assert not trace.lacks("layers.0.self_attn.rotary_emb.inv_freq")
    assert not trace.lacks("layers.1.self_attn.q_norm.weight")
    assert not trace.lacks("lm_head.weight")
