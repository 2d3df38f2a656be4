"""Loading without noise, and a forward that stops where nobody reads on."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from flashsae.errors import ConfigError
from flashsae.lm.hookpoints import resolve_hookpoints
from flashsae.lm.loading import load_language_model


@pytest.mark.parametrize(("name", "n_layers"), [("gpt2", 3), ("llama", 2), ("bert", 2)])
def test_the_forward_stops_behind_the_last_hooked_module(tiny: ModuleType, name: str, n_layers: int) -> None:
    make, pattern = tiny.FAMILIES[name]
    model = make().base_model
    ran: list[str] = []
    for path in resolve_hookpoints(model, [pattern]):
        model.get_submodule(path).register_forward_hook(lambda module, args, output, path=path: ran.append(path))
    layers = resolve_hookpoints(model, [pattern])
    config = dataclasses.replace(tiny.SMALL, hookpoint=layers[0])
    reader = tiny.source(config, model=model)
    assert ran == [layers[0]]
    next(reader.chunks("train"))
    assert ran == [layers[0]] * 2
    ran.clear()
    both = tiny.source(config, hookpoints=(layers[1], layers[0]), model=model)
    assert ran == [layers[0], layers[1]]
    assert both.hookpoints == (layers[1], layers[0])
    assert len(layers) == n_layers


def test_attention_that_prepares_for_each_shape_is_left_out(tiny: ModuleType) -> None:
    model = tiny.gpt2().base_model
    enabled: list[bool] = []
    model.h[0].register_forward_hook(lambda *_: enabled.append(torch.backends.cuda.cudnn_sdp_enabled()))
    before = torch.backends.cuda.cudnn_sdp_enabled()
    reader = tiny.source(dataclasses.replace(tiny.SMALL, hookpoint="h.0"), model=model)
    next(reader.chunks("train"))
    assert enabled == [False, False]
    assert torch.backends.cuda.cudnn_sdp_enabled() == before


def test_a_given_model_is_as_it_was_afterwards(tiny: ModuleType) -> None:
    model = tiny.gpt2().train()
    model.base_model.h[1].eval()
    modes = [module.training for module in model.modules()]
    model.base_model.gradient_checkpointing = True
    reader = tiny.source(model=model)
    acts = next(reader.chunks("train"))[0].acts["h.1"]
    assert not acts.requires_grad
    assert torch.equal(acts, next(tiny.source(model=tiny.gpt2().eval()).chunks("train"))[0].acts["h.1"])
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert [module.training for module in model.modules()] == modes
    assert model.base_model.gradient_checkpointing


def test_a_later_layer_that_works_in_place_changes_nothing(tiny: ModuleType) -> None:
    model = tiny.gpt2()
    expected = tiny.collect(tiny.source(model=model), None)[0]

    def add_in_place(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        args[0].add_(1.0)

    model.base_model.get_submodule("h.2").register_forward_pre_hook(add_in_place)
    both, _ = tiny.collect(tiny.source(hookpoints=("h.1", "h.2"), model=model), None)
    assert torch.equal(both.acts["h.1"], expected.acts["h.1"])


def test_loading_and_reading_are_quiet_and_change_no_settings(tiny: ModuleType, tmp_path: Path) -> None:
    from transformers import BertForMaskedLM

    BertForMaskedLM(tiny.bert().config).save_pretrained(tmp_path)  # its head is weights that AutoModel has no use for
    tokenizer = tiny.word_tokenizer()
    tokenizer.model_max_length = 32
    tokenizer.save_pretrained(tmp_path)
    code = f"""
import torch, transformers
from flashsae.data.language_model import LanguageModelSource
from flashsae.lm.loading import load_language_model
from flashsae.text.open import open_text
from flashsae.settings.reading import ReadingConfig
log = transformers.utils.logging
before = log.get_verbosity(), log.is_progress_bar_enabled()
model, tokenizer = load_language_model("minilm", torch.bfloat16)
config = ReadingConfig({str(tmp_path)!r}, hookpoint="encoder.layer.1", context_length=32)
source = LanguageModelSource(config, open_text(["the cat sat " * 300]), held_out=0.0, device="cpu")
assert sum(len(chunk.group) for chunk, _ in source.chunks("train")) == 900
assert (log.get_verbosity(), log.is_progress_bar_enabled()) == before
assert {{str(parameter.dtype) for parameter in model.parameters()}} == {{"torch.bfloat16"}}
"""
    command = [sys.executable, "-W", "error::FutureWarning", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_model_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"could not load 'nothing' \(.*\)\. Expected 'minilm', a folder") as caught:
        load_language_model("nothing", torch.float32)
    assert "\n" not in str(caught.value)
    for path in (str(tmp_path / "nothing"), "./nothing", "../nothing", "~/nothing"):
        with pytest.raises(ConfigError, match=f"model: there is no such folder, {path}"):
            load_language_model(path, torch.float32)
