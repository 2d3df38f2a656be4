"""Patterns stand for outputs of modules, or with `:in` for their inputs; a name that fits nothing is told of."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from flashsae.errors import ConfigError
from flashsae.lm.hookpoints import folder_of, match_hookpoints, module_of, patterns_in, resolve_hookpoints


def test_wildcards_stay_within_a_level_and_sort_numbers_as_numbers(tiny: ModuleType) -> None:
    model = tiny.gpt2(layers=11).base_model
    assert resolve_hookpoints(model, ["h.*"]) == tuple(f"h.{i}" for i in range(11))
    assert resolve_hookpoints(model, ["h.1?", "h.2", "h.*.mlp"])[:4] == ("h.10", "h.2", "h.0.mlp", "h.1.mlp")
    assert resolve_hookpoints(model, ["h.2", "h.[12]"]) == ("h.2", "h.1")
    assert resolve_hookpoints(model, ["transformer.h.3"]) == ("h.3",)
    assert match_hookpoints("h.*", ["h.10", "h.9", "h.9.mlp", "g.1"]) == ["h.9", "h.10"]
    assert match_hookpoints("x.*", ["h.10"]) == []


@pytest.mark.parametrize("wrapper", ["base_model.model.", "_orig_mod.", "module._orig_mod.", ""])
def test_paths_as_a_wrapped_model_prints_them_are_known(tiny: ModuleType, wrapper: str) -> None:
    model = tiny.gpt2().base_model
    assert resolve_hookpoints(model, [f"{wrapper}transformer.h.1", f"{wrapper}h.2.mlp:in"]) == ("h.1", "h.2.mlp:in")
    own = torch.nn.ModuleDict({"module": torch.nn.ModuleDict({"h": torch.nn.Identity()}), "h": torch.nn.Identity()})
    assert resolve_hookpoints(own, ["module.h"]) == ("module.h",)


@pytest.mark.parametrize("pattern", ["h.7", "layers.*", "h.1.mpl", "nothing"])
def test_an_unknown_hookpoint_names_near_ones(tiny: ModuleType, pattern: str) -> None:
    with pytest.raises(ConfigError, match=r"no module .*Near: \w.*Its layers are h\.0 to h\.2\.") as caught:
        resolve_hookpoints(tiny.gpt2().base_model, [pattern])
    assert ("h.1.mlp" in str(caught.value)) == (pattern == "h.1.mpl")


@pytest.mark.parametrize("name", ["blocks.2.hook_resid_post", "blocks.2.attn.hook_z", "blocks.2.hook_resid_pre"])
def test_a_name_of_transformer_lens_is_told_apart(tiny: ModuleType, name: str) -> None:
    told = rf"got '{name}', a name of TransformerLens\. What block 2 gives is h\.2, and what it is given h\.2:in\."
    with pytest.raises(ConfigError, match=told):
        resolve_hookpoints(tiny.gpt2().base_model, [name])
    with pytest.raises(ConfigError, match=r"no module 'blocks\.7\.hook_resid_post'\. Near: .* h\.0 to h\.2\."):
        resolve_hookpoints(tiny.gpt2().base_model, ["blocks.7.hook_resid_post"])


def test_inputs_and_outputs_are_told_apart(tiny: ModuleType) -> None:
    model = tiny.gpt2(layers=11).base_model
    assert resolve_hookpoints(model, ["h.*:in"]) == tuple(f"h.{i}:in" for i in range(11))
    assert resolve_hookpoints(model, ["h.2.mlp:in", "h.2.mlp:out", "h.2.mlp"]) == ("h.2.mlp:in", "h.2.mlp")
    assert resolve_hookpoints(model, ["transformer.h.3.mlp:in"]) == ("h.3.mlp:in",)
    held = ["h.0", "h.0:in", "h.1.mlp", "h.10:in", "h.9:in"]
    assert match_hookpoints("h.*", held) == match_hookpoints("h.*:out", held) == ["h.0"]
    assert match_hookpoints("h.*:in", held) == ["h.0:in", "h.9:in", "h.10:in"]
    assert {module_of(name) for name in held[:2]} == {"h.0"}
    with pytest.raises(ConfigError, match=r"the model has no module 'h\.70'\. Near: h\."):
        resolve_hookpoints(model, ["h.70:in"])


@pytest.mark.parametrize("wrong", ["h.0:input", "h.0:", "h.0:in:in", "h.0:IN", ":in", "h.0:in.mlp"])
def test_what_stands_behind_a_colon_is_in_or_out(tiny: ModuleType, wrong: str) -> None:
    with pytest.raises(
        ConfigError, match=r"^hookpoint: (expected a module path, .* or .*:in, for its input, got|the model has no)"
    ):
        resolve_hookpoints(tiny.gpt2().base_model, [wrong])


def test_braces_stand_for_each_choice_and_all_of_them_must_be_there(tiny: ModuleType) -> None:
    model = tiny.gpt2(layers=11).base_model
    assert resolve_hookpoints(model, ["h.{10,2}.mlp", "transformer.h.{0,1}:in"]) == (
        *("h.2.mlp", "h.10.mlp"),
        *("h.0:in", "h.1:in"),
    )
    assert resolve_hookpoints(model, ["h.{0,1}.{mlp,attn}"]) == ("h.0.attn", "h.0.mlp", "h.1.attn", "h.1.mlp")
    assert patterns_in(" h.{1,2}:in , h.3,h.[45]") == ["h.{1,2}:in", "h.3", "h.[45]"]
    with pytest.raises(ConfigError, match=r"no module 'h\.70'"):
        resolve_hookpoints(model, ["h.{0,70}"])


def test_no_folder_holds_what_a_file_system_may_refuse() -> None:
    assert folder_of("layers.6.mlp") == "layers.6.mlp"
    assert folder_of("layers.6.mlp:in") == "layers.6.mlp@in"
    assert folder_of("layers.6.mlp:in, layers.6.mlp") == "layers.6.mlp@in+layers.6.mlp"
