from __future__ import annotations

import pytest
import torch

from flashsae.formats.hook_names import (
    hook_name_of,
    hookpoint_of,
    hookpoints_of,
    is_hookpoint,
    layer_of,
    model_name_of,
    model_of,
)

PAIRS = {
    "gpt2": {
        "h.6": "hook_resid_post", "h.6:in": "hook_resid_pre", "h.6.attn": "hook_attn_out", "h.6.mlp": "hook_mlp_out",
        "h.6.mlp:in": "mlp.hook_in", "h.6.ln_2:in": "hook_resid_mid", "h.6.attn.c_proj:in": "attn.hook_z",
    },
    "roneneldan/TinyStories-33M": {"h.6.attn.attention.out_proj:in": "attn.hook_z", "h.6": "hook_resid_post"},
    "gpt-j-6B": {"h.6.mlp": "hook_mlp_out", "h.6": "hook_resid_post"},
    "pythia-70m-deduped": {
        "layers.6": "hook_resid_post", "layers.6.attention": "hook_attn_out", "layers.6.mlp": "hook_mlp_out",
        "layers.6.mlp.dense_4h_to_h:in": "mlp.hook_post",
    },
    "meta-llama/Llama-3.1-8B": {
        "layers.6": "hook_resid_post", "layers.6.post_attention_layernorm:in": "hook_resid_mid",
        "layers.6.mlp": "hook_mlp_out", "layers.6.self_attn": "hook_attn_out",
    },
    "Qwen/Qwen2.5-0.5B": {"layers.6.self_attn.o_proj:in": "attn.hook_z"},
    "mistralai/Mistral-7B-v0.1": {"layers.6.mlp.down_proj:in": "mlp.hook_post"},
    "google/gemma-2b": {"layers.6.mlp": "hook_mlp_out"},
    "google/gemma-2-2b": {
        "layers.6": "hook_resid_post", "layers.6.post_feedforward_layernorm": "hook_mlp_out",
        "layers.6.mlp": "mlp.hook_out", "layers.6.post_attention_layernorm": "hook_attn_out",
        "layers.6.pre_feedforward_layernorm:in": "hook_resid_mid", "layers.6.mlp:in": "mlp.hook_in",
    },
    "allenai/OLMo-2-0425-1B": {"layers.6.post_feedforward_layernorm": "hook_mlp_out"},
    "microsoft/phi-2": {"layers.6.mlp.fc2:in": "mlp.hook_post"},
    "facebook/opt-125m": {"decoder.layers.6": "hook_resid_post", "decoder.layers.6.fc2": "hook_mlp_out"},
    "bert-base-uncased": {
        "encoder.layer.6": "hook_normalized_resid_post", "encoder.layer.6.output.LayerNorm:in": "hook_resid_post",
    },
    "Qwen/Qwen3-30B-A3B": {"layers.6": "hook_resid_post"},
}  # fmt: skip


@pytest.mark.parametrize("model", PAIRS)
def test_names_of_a_family_are_translated_both_ways(model: str) -> None:
    for hookpoint, hook in PAIRS[model].items():
        assert hook_name_of(hookpoint, model) == f"blocks.6.{hook}"
        assert hookpoint_of(f"blocks.6.{hook}", model) == hookpoint


def test_what_has_no_counterpart_is_none() -> None:
    assert hookpoint_of("blocks.6.ln2.hook_normalized", "gpt2") is None  # before the weights of the norm
    for model in ("pythia-70m", "gpt-j-6B", "phi-2"):  # attention and MLP stand side by side
        assert hookpoint_of("blocks.6.hook_resid_mid", model) is None
    for name in ("hook_embed", "blocks.x.hook_resid_post", "blocks.6", "h.6", "", "blocks.6.hook_resid_post\n"):
        assert hookpoint_of(name, "gpt2") is None
    assert hookpoint_of("blocks.6.hook_resid_post", None) is None
    assert hookpoint_of("blocks.6.hook_resid_post", "somebody/model") is None
    assert hookpoint_of("blocks.6.hook_mlp_out", "Qwen/Qwen3-30B-A3B") is None
    for hookpoint in ("wte", "layers.6", "vision_model.encoder.layers.6", "h.6.ln_1", "h.x", "h", "", "h.6:up"):
        assert hook_name_of(hookpoint, "gpt2") is None
    assert hook_name_of("layers.6.mlp", "somebody/model") is None  # Gemma 2 and Llama differ
    assert hook_name_of("vision_tower.layers.6", None) is None


def test_what_all_families_share_has_a_name_without_one() -> None:
    for model in (None, "", "/home/me/model"):
        assert hook_name_of("layers.6", model) == hook_name_of("h.6", model) == "blocks.6.hook_resid_post"
        assert hook_name_of("layers.6:in", model) == "blocks.6.hook_resid_pre"
        assert hook_name_of("encoder.layer.6", model) == "blocks.6.hook_normalized_resid_post"
        assert hook_name_of("h.6.mlp", model) == "blocks.6.hook_mlp_out"


def test_paths_of_a_whole_model_and_names_of_version_3_are_understood() -> None:
    assert hook_name_of("model.layers.12", "google/gemma-2-2b") == "blocks.12.hook_resid_post"
    assert hook_name_of("model.language_model.layers.12:out", "google/gemma-3-4b-pt") == "blocks.12.hook_resid_post"
    assert hook_name_of("transformer.h.0.mlp", "gpt2-small") == "blocks.0.hook_mlp_out"
    assert hook_name_of("gpt_neox.layers.3", "pythia-70m") == "blocks.3.hook_resid_post"
    assert hookpoint_of("blocks.3.hook_out", "gpt2") == "h.3"
    assert hookpoint_of("blocks.3.hook_in", "gpt2") == "h.3:in"
    assert hookpoint_of("blocks.03.mlp.hook_out", "gpt2") == "h.3.mlp"


def test_the_number_of_a_layer() -> None:
    for name in ("h.6", "h.6:in", "model.layers.6.mlp:in", "encoder.layer.6.output", "blocks.6.hook_z", "layers.6.e.2"):
        assert layer_of(name) == 6
    for name in ("", "wte", "layers.x", "h6", "hook_embed", "h.-1", "h.99999999999999999999"):
        assert layer_of(name) is None


def test_names_of_models() -> None:
    pairs = {
        "gpt2-small": "gpt2", "pythia-70m-deduped": "EleutherAI/pythia-70m-deduped", "phi-2": "microsoft/phi-2",
        "gemma-2-2b": "google/gemma-2-2b", "Llama-3.1-8B": "meta-llama/Llama-3.1-8B", "solu-1l": "solu-1l",
        "mistral-7b": "mistralai/Mistral-7B-v0.1", "me/gpt2-small": "me/gpt2-small", "gpt-neo-small": "gpt-neo-small",
    }  # fmt: skip
    assert {name: model_of(name) for name in pairs} == pairs
    assert model_name_of("openai-community/gpt2-xl") == "gpt2-xl"
    assert model_name_of("google/gemma-2-2b") == "google/gemma-2-2b"


SMALL = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 11}
OLD = {"n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 11, "bos_token_id": 0, "eos_token_id": 0}
GEMMA = {**SMALL, "num_key_value_heads": 1, "head_dim": 4}
REAL = {
    "gpt2": ("GPT2", OLD),
    "EleutherAI/gpt-neo-125m": (
        "GPTNeo", {**SMALL, "num_layers": 1, "num_heads": 2, "attention_types": [[["global"], 1]]}
    ),
    "EleutherAI/gpt-j-6b": ("GPTJ", {**OLD, "rotary_dim": 4}),
    "pythia-70m": ("GPTNeoX", SMALL),
    "gemma-2-2b": ("Gemma2", GEMMA),
    "google/gemma-2b": ("Gemma", GEMMA),
    "allenai/OLMo-2-0425-1B": ("Olmo2", SMALL),
    "phi-2": ("Phi", SMALL),
    "phi-3": ("Phi3", {**SMALL, "pad_token_id": 0}),
    "Llama-3.1-8B": ("Llama", SMALL),
    "facebook/opt-125m": ("OPT", {**SMALL, "ffn_dim": 16, "word_embed_proj_dim": 8}),
    "bert-base-cased": ("Bert", SMALL),
}  # fmt: skip


@pytest.mark.parametrize("model", REAL)
def test_every_hookpoint_of_a_family_is_there_and_holds_what_its_name_says(model: str) -> None:
    transformers = pytest.importorskip("transformers")
    kind, sizes = REAL[model]
    config = getattr(transformers, f"{kind}Config")(**{"bos_token_id": 0, "eos_token_id": 0, **sizes})
    network = getattr(transformers, f"{kind}Model")(config).eval()
    seen: dict[str, torch.Tensor] = {}

    def keep(hook: str, value: object) -> None:
        first = value[0] if isinstance(value, tuple) else value
        assert isinstance(first, torch.Tensor)
        seen[hook] = first.detach().reshape(3, -1)

    names = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out", "mlp.hook_in")
    hooks = [*names, "mlp.hook_pre", "mlp.hook_post", "attn.hook_z"]
    for hook in hooks:
        place = hookpoint_of(f"blocks.0.{hook}", model)
        if place is None:
            assert hook in ("hook_resid_mid", "mlp.hook_pre")
        elif place.endswith(":in"):
            network.get_submodule(place.removesuffix(":in")).register_forward_pre_hook(
                lambda _, args, kwargs, hook=hook: keep(hook, args or tuple(kwargs.values())), with_kwargs=True
            )
        else:
            network.get_submodule(place).register_forward_hook(lambda _, args, out, hook=hook: keep(hook, out))
    network(input_ids=torch.tensor([[1, 2, 3]]))
    if kind != "Bert":  # its norms stand in the stream
        added = seen["hook_attn_out"] + seen["hook_mlp_out"]
        torch.testing.assert_close(seen["hook_resid_pre"] + added, seen["hook_resid_post"])
    if "hook_resid_mid" in seen:
        torch.testing.assert_close(seen["hook_resid_pre"] + seen["hook_attn_out"], seen["hook_resid_mid"])


def test_places_of_several_hooks_are_those_of_each_or_none() -> None:
    assert hookpoints_of(["blocks.3.mlp.hook_in", "blocks.3.hook_mlp_out"], "gpt2") == "h.3.mlp:in, h.3.mlp"
    assert hookpoints_of(["blocks.3.ln2.hook_normalized", "blocks.3.hook_mlp_out"], "gpt2") is None


def test_paths_in_blocks_look_as_hookpoints() -> None:
    assert all(map(is_hookpoint, ("h.6", "model.layers.6.mlp:in", "gpt_neox.layers.0.attention", "blocks.11")))
    assert not any(map(is_hookpoint, ("", "h", "resid_post_layer_6", "seed1", "h.6:out", "h.6.", "../h.6")))
