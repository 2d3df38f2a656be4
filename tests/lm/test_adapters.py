"""Adapters are put onto their models, count in the fingerprint, and are refused in one sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flashsae.data.language_model import LanguageModelSource
from flashsae.errors import ConfigError
from flashsae.lm.options import LoadOptions
from flashsae.lm.parts import bare
from flashsae.lm.weights import model_fingerprint
from flashsae.settings.reading import ReadingConfig
from flashsae.text.open import open_text

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft, which is older than transformers
TEXT = open_text(["the cat sat on a mat"] * 3)


def lora(model: nn.Module, **settings: Any) -> Any:
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    config = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, **settings}
    return peft.get_peft_model(model, peft.LoraConfig(**config)).eval()


def causal(tiny: ModuleType) -> Any:
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(tiny.llama().config)


@pytest.fixture
def base(tiny: ModuleType, tmp_path: Path) -> Path:
    causal(tiny).save_pretrained(tmp_path / "base")
    tiny.word_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def adapter(tiny: ModuleType, tmp_path: Path, base: Path) -> Path:
    model = lora(causal(tiny), task_type="CAUSAL_LM")
    model.save_pretrained(tmp_path / "adapter")
    change(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path=str(base))
    return tmp_path / "adapter"


def change(file: Path, **settings: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def read(model: Path, hookpoint: str = "layers.1", **settings: Any) -> LanguageModelSource:
    config = ReadingConfig(str(model), hookpoint=hookpoint, context_length=16, forward_tokens=64, **settings)
    return LanguageModelSource(config, TEXT, held_out=0.0, device="cpu")


def acts(source: LanguageModelSource) -> Tensor:
    return next(source.chunks(None))[0].acts["layers.1"]


def test_an_adapter_beside_its_model_and_one_that_names_it_read_the_same(
    tiny: ModuleType, base: Path, adapter: Path
) -> None:
    config = replace(tiny.SMALL, hookpoint="layers.1")
    given = tiny.source(config, TEXT, model=lora(causal(tiny), task_type="CAUSAL_LM"), held_out=0.0)
    beside, named = read(base, adapter=str(adapter)), read(adapter)
    assert torch.equal(acts(beside), acts(given))
    assert torch.equal(acts(named), acts(given))
    assert not torch.equal(acts(read(base)), acts(given))
    assert beside.fingerprint == named.fingerprint != read(base).fingerprint


def test_base_and_adapter_both_count(base: Path, adapter: Path) -> None:
    before = model_fingerprint(str(adapter))
    assert before == model_fingerprint(str(base), LoadOptions(adapter=str(adapter)))
    change(adapter / "adapter_config.json", lora_alpha=64)
    changed = model_fingerprint(str(adapter))
    change(base / "config.json", rms_norm_eps=0.5)
    assert len({before, changed, model_fingerprint(str(adapter)), model_fingerprint(str(base))}) == 4


def without_some(adapter: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(adapter / "adapter_model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "layers.1.self_attn.v_proj" not in name}
    save_file(kept, adapter / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_some, r"does not fit its architecture.*it lacks layers\.1\.self_attn\.v_proj\.lora"),
        (lambda adapter: (adapter / "adapter_config.json").write_text("{"), "adapter: cannot read the adapter_config"),
        (lambda adapter: (adapter / "adapter_config.json").write_text("[]"), "adapter: cannot read the adapter_config"),
        (lambda adapter: (adapter / "adapter_model.safetensors").unlink(), "could not load"),
        (lambda adapter: (adapter / "adapter_model.safetensors").write_bytes(b"12345678"), "could not load"),
        (
            lambda adapter: change(adapter / "adapter_config.json", base_model_name_or_path=None),
            "holds an adapter that does not say of which model; name that as model, and this as adapter",
        ),
        (
            lambda adapter: change(adapter / "adapter_config.json", megatron_config={}, megatron_core="antigravity"),
            "names Python modules to import",
        ),
        (
            lambda adapter: change(adapter / "adapter_config.json", base_model_name_or_path="/nowhere"),
            "there is no such folder, /nowhere",
        ),
        (lambda adapter: change(adapter / "adapter_config.json", peft_type="NEW"), "could not load"),
    ],
)
def test_an_adapter_that_cannot_be_put_on_is_one_sentence(
    adapter: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(adapter)
    with pytest.raises(ConfigError, match=message) as caught:
        read(adapter)
    assert "\n" not in str(caught.value)


def test_what_is_no_adapter_or_one_too_many_is_refused(base: Path, adapter: Path) -> None:
    with pytest.raises(ConfigError, match=r"adapter: cannot read the adapter_config\.json of .*there is none"):
        read(base, adapter=str(base))
    with pytest.raises(ConfigError, match=r"adapter: expected none beside .*, which is an adapter itself"):
        read(adapter, adapter=str(adapter))


def test_what_a_wrapper_holds_is_read(tiny: ModuleType) -> None:
    config = replace(tiny.SMALL, hookpoint="layers.1")
    plain = acts(tiny.source(config, TEXT, model=causal(tiny), held_out=0.0))
    compiled = causal(tiny)
    compiled.compile(backend="eager")
    wrapped = [causal(tiny), nn.DataParallel(causal(tiny)), torch.compile(causal(tiny), backend="eager"), compiled]
    for model in (*wrapped, nn.DataParallel(wrapped[2])):
        assert type(bare(model)).__name__ == "LlamaModel"
        assert torch.equal(acts(tiny.source(config, TEXT, model=model, held_out=0.0)), plain)
    adapted = lora(causal(tiny), task_type="CAUSAL_LM")
    inside = acts(tiny.source(config, TEXT, model=adapted, held_out=0.0))
    assert not torch.equal(inside, plain)
    assert torch.equal(
        acts(tiny.source(config, TEXT, model=torch.compile(adapted, backend="eager"), held_out=0.0)), inside
    )
    part = tiny.source(replace(config, hookpoint="model.layers.1.self_attn.q_proj"), TEXT, model=adapted, held_out=0.0)
    assert part.widths == {"layers.1.self_attn.q_proj": 16}


def test_an_adapter_that_adds_tokens_is_refused(tiny: ModuleType) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(causal(tiny), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ConfigError, match=r"its adapter adds tokens to what the model reads.*such as LoRA") as caught:
        tiny.source(replace(tiny.SMALL, hookpoint="layers.1"), TEXT, model=model)
    assert "\n" not in str(caught.value)


def test_hooks_of_others_run_and_stay(tiny: ModuleType) -> None:
    model = causal(tiny)
    config = replace(tiny.SMALL, hookpoint="layers.1")
    plain = acts(tiny.source(config, TEXT, model=model, held_out=0.0))
    calls: list[int] = []

    def steer(module: nn.Module, args: object, output: Any) -> Any:
        calls.append(1)
        return output + 1 if isinstance(output, Tensor) else (output[0] + 1, *output[1:])

    model.model.layers[0].register_forward_hook(steer)
    steered = acts(tiny.source(config, TEXT, model=model, held_out=0.0))
    assert calls
    assert not torch.equal(steered, plain)
    assert len(model.model.layers[0]._forward_hooks) == 1
