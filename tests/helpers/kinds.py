"""A tiny random model of every kind that is read: how it is made, a site of each, and what runs behind it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from helpers.tiny_models import _BART, _IMAGES, _SIZES, MORE_FAMILIES, _make, bert

_LONG = {"vocab_size": 64, "max_position_embeddings": 64}
_EXPERTS = {**_LONG, **_SIZES, "num_key_value_heads": 2, "moe_intermediate_size": 16}
_TRANSLATES = {"src_vocab_size": 64, "tgt_vocab_size": 64, "langs": ["en", "de"], "max_position_embeddings": 64}
_TRANSLATES |= {name: size for name, size in _BART.items() if name != "vocab_size"}
_TEXT = {"model_type": "llama", **_LONG, **_SIZES, "num_key_value_heads": 2}
_GEMMA = {**_TEXT, "model_type": "gemma3_text", "head_dim": 8}
_ROPE = {"type": "mrope", "rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
_QWEN = {**_TEXT, "model_type": "qwen2_vl_text", "rope_scaling": _ROPE}
_SIGHT = {"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": 16}
_IMAGE_TOKEN = {"image_token_index": 50}
_RANKS = {"head_dim": 16, "qk_rope_head_dim": 8, "q_lora_rank": 8, "o_lora_rank": 8, "o_groups": 1}
_RANKS |= {"index_n_heads": 2, "index_head_dim": 8}
_MARKS = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1, "cls_token_id": 0, "sep_token_id": 1}
_STATES = {"vocab_size": 64, "hidden_size": 16, "state_size": 8, "num_hidden_layers": 2}
_EVERY_OTHER = {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "num_experts_per_tok": 1}


@dataclass(frozen=True)
class Kind:
    """A model of one kind.

    Args:
        make: returns it, random.
        hookpoint: a module of it that gives a vector for each token.
        behind: a module that does not run once that one has.
        given_by: the module whose output is the input of `hookpoint`; "" where there is none.
        side: of an encoder and a decoder.
        width: of what is at the hookpoint.
    """

    make: Callable[[], nn.Module]
    hookpoint: str
    behind: str
    given_by: str = ""
    side: str | None = None
    width: int = 16


def _of(family: str, **settings: Any) -> Callable[[], nn.Module]:
    return lambda: _make(family, **settings)


KINDS: dict[str, Kind] = {
    # causal
    "gpt2": Kind(MORE_FAMILIES["gpt2"], "h.1", "h.2", "h.0"),
    "llama": Kind(MORE_FAMILIES["llama"], "layers.1", "norm", "layers.0"),
    "gemma2": Kind(_of("Gemma2", head_dim=8, **_EXPERTS), "layers.1", "norm", "layers.0"),
    "qwen2": Kind(_of("Qwen2", **_EXPERTS), "layers.0", "layers.1"),
    "gpt_neox": Kind(MORE_FAMILIES["gpt_neox"], "layers.1", "final_layer_norm", "layers.0"),
    "opt": Kind(MORE_FAMILIES["opt"], "decoder.layers.0", "decoder.layers.1"),
    "phi": Kind(_of("Phi", **_EXPERTS), "layers.1", "final_layernorm", "layers.0"),
    # [length, sequences, d] inside, and several streams of each token
    "xlnet": Kind(_of("XLNet", vocab_size=64, d_model=16, n_layer=2, n_head=2, d_inner=24), "layer.0", "layer.1"),
    "deepseek_v4": Kind(
        _of("DeepseekV4", **_RANKS, hc_mult=4, n_routed_experts=4, num_experts_per_tok=2, **_EXPERTS),
        "layers.0", "layers.1", width=64,
    ),
    "gemma3n": Kind(
        _of("Gemma3nText", vocab_size_per_layer_input=64, hidden_size_per_layer_input=8, laurel_rank=4,
            num_kv_shared_layers=0, altup_num_inputs=4, head_dim=8, layer_types=["full_attention"] * 2,
            activation_sparsity_pattern=[0.0, 0.0], **(_EXPERTS | {"intermediate_size": [24, 24]})),
        "layers.0", "layers.1", width=64,
    ),
    # masked
    "bert": Kind(bert, "encoder.layer.0", "encoder.layer.1"),
    "roberta": Kind(MORE_FAMILIES["roberta"], "encoder.layer.1", "pooler", "encoder.layer.0"),
    "modernbert": Kind(_of("ModernBert", **_MARKS, **_LONG, **_SIZES), "layers.0", "layers.1"),
    # an encoder and a decoder
    "t5 encoder": Kind(MORE_FAMILIES["t5"], "encoder.block.1", "encoder.final_layer_norm", "encoder.block.0"),
    "t5 decoder": Kind(MORE_FAMILIES["t5"], "decoder.block.0", "decoder.block.1", "decoder.dropout", "decoder"),
    "bart encoder": Kind(MORE_FAMILIES["bart"], "encoder.layers.0", "encoder.layers.1"),
    "bart decoder": Kind(
        MORE_FAMILIES["bart"], "decoder.layers.0", "decoder.layers.1", "decoder.layernorm_embedding", "decoder"
    ),
    "fsmt encoder": Kind(_of("FSMT", **_TRANSLATES), "encoder.layers.0", "encoder.layers.1"),
    "fsmt decoder": Kind(_of("FSMT", **_TRANSLATES), "decoder.layers.0", "decoder.layers.1", side="decoder"),
    # state spaces, and mixtures of these with attention
    "mamba": Kind(_of("Mamba", **_STATES), "layers.1", "norm_f", "layers.0"),
    "mamba2": Kind(_of("Mamba2", num_heads=4, head_dim=8, n_groups=1, chunk_size=8, **_STATES), "layers.0", "layers.1"),
    "rwkv": Kind(
        _of("Rwkv", vocab_size=64, context_length=64, hidden_size=16, num_hidden_layers=2),
        "blocks.1", "ln_out", "blocks.0",
    ),
    "jamba": Kind(
        _of("Jamba", mamba_d_state=8, mamba_dt_rank=4, use_mamba_kernels=False, **_EVERY_OTHER, **_EXPERTS),
        "layers.0", "layers.1",
    ),
    # mixtures of experts
    "mixtral": Kind(_of("Mixtral", num_local_experts=4, **_EXPERTS), "layers.0", "layers.1"),
    "qwen2_moe": Kind(
        _of("Qwen2Moe", num_experts=4, num_experts_per_tok=2, shared_expert_intermediate_size=16, **_EXPERTS),
        "layers.0.mlp", "layers.1",
    ),
    "olmoe": Kind(_of("Olmoe", num_experts=4, num_experts_per_tok=2, **_EXPERTS), "layers.1", "norm", "layers.0"),
    # several kinds of input, of which text is one
    "clip": Kind(MORE_FAMILIES["clip"], "text_model.encoder.layers.0", "text_model.encoder.layers.1"),
    "llava": Kind(
        _of("Llava", vision_config={"model_type": "clip_vision_model", **_IMAGES}, text_config=_TEXT, **_IMAGE_TOKEN),
        "layers.0", "language_model.layers.1",
    ),
    "gemma3": Kind(
        _of("Gemma3", vision_config={"model_type": "siglip_vision_model", **_IMAGES}, text_config=_GEMMA,
            mm_tokens_per_image=4, **_IMAGE_TOKEN),
        "language_model.layers.0", "language_model.layers.1",
    ),
    "qwen2_vl": Kind(
        _of("Qwen2VL", vision_config=_SIGHT, text_config=_QWEN), "layers.1", "language_model.norm",
        "language_model.layers.0",
    ),
}  # fmt: skip
