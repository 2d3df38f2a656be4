"""Names of places in models: ours, which are paths of modules, and those of transformer-lens, which are of its own.

    h.6, layers.6           blocks.6.hook_resid_post      the residual stream behind a block
    h.6:in                  blocks.6.hook_resid_pre       the same before it
    h.6.mlp                 blocks.6.hook_mlp_out         what the MLP adds to it
    h.6.mlp:in              blocks.6.mlp.hook_in          what the MLP is given

What a module is called, and what it does, differs from family to family: behind the attention and the MLP of Gemma 2
stand norms, and what is added to the stream is theirs. So a name is translated for a model, by the family that its name
tells. What has no counterpart is None: `ln2.hook_normalized` is taken before the norm multiplies by its weights, and no
module gives that; nor is there a stream between attention and MLP where they stand side by side.

Source: transformer-lens 3.9, components/transformer_block.py, bert_block.py and rms_norm.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_IN, _OUT = ":in", ":out"


@dataclass(frozen=True)
class _Family:
    """Models whose modules are called alike.

    Args:
        models: a regular expression for names without the owner, in small letters.
        blocks: what a block is called, before its number.
        places: by the name of a hook in a block, the path in a block and which side of the module.
        root: what the base model is called in a model that predicts tokens.
    """

    models: str
    blocks: str
    places: Mapping[str, str]
    root: str = "model"


_STREAM = {"hook_resid_post": "", "hook_resid_pre": _IN}
_MLP = {"hook_mlp_out": ".mlp", "mlp.hook_in": ".mlp:in", "mlp.hook_out": ".mlp"}
_GPT = {**_STREAM, "hook_attn_out": ".attn", "attn.hook_out": ".attn", **_MLP}
_GATED = {"mlp.hook_pre": ".mlp.gate_proj", "mlp.hook_pre_linear": ".mlp.up_proj", "mlp.hook_post": ".mlp.down_proj:in"}
_GPT2_MLP = {"hook_resid_mid": ".ln_2:in", "mlp.hook_pre": ".mlp.c_fc", "mlp.hook_post": ".mlp.c_proj:in"}
_SELF_ATTN = {"hook_attn_out": ".self_attn", "attn.hook_out": ".self_attn"}
_LLAMA = {
    **_STREAM, **_SELF_ATTN, **_MLP, "hook_resid_mid": ".post_attention_layernorm:in",
    "attn.hook_z": ".self_attn.o_proj:in",
}  # fmt: skip
_BEHIND_NORMS = {
    "hook_attn_out": ".post_attention_layernorm", "attn.hook_out": ".self_attn",
    "hook_mlp_out": ".post_feedforward_layernorm",
}  # fmt: skip

_FAMILIES = (
    _Family(
        r"(distill?-?|stanford-)?gpt-?2\b.*|.*-gpt2-(small|medium)-x\d+", "h",
        {**_GPT, **_GPT2_MLP, "attn.hook_z": ".attn.c_proj:in"},
        "transformer",
    ),
    _Family(
        r"gpt-neo-.*|tiny-?stories-.*", "h", {**_GPT, **_GPT2_MLP, "attn.hook_z": ".attn.attention.out_proj:in"},
        "transformer",
    ),
    _Family(
        r"gpt-?j\b.*", "h",
        {**_GPT, "mlp.hook_pre": ".mlp.fc_in", "mlp.hook_post": ".mlp.fc_out:in", "attn.hook_z": ".attn.out_proj:in"},
        "transformer",
    ),
    _Family(
        r"pythia\b.*|gpt-neox\b.*", "layers",
        {
            **_STREAM, "hook_attn_out": ".attention", "attn.hook_out": ".attention", **_MLP,
            "mlp.hook_pre": ".mlp.dense_h_to_4h", "mlp.hook_post": ".mlp.dense_4h_to_h:in",
            "attn.hook_z": ".attention.dense:in",
        },
        "gpt_neox",
    ),
    _Family(
        r"(vault|med)?gemma-?[23]\b(?!b).*|medgemma-.*", "layers",
        {**_LLAMA, **_GATED, **_BEHIND_NORMS, "hook_resid_mid": ".pre_feedforward_layernorm:in"},
    ),
    _Family(r"olmo-[23]\b.*", "layers", {**_LLAMA, **_GATED, **_BEHIND_NORMS, "hook_resid_mid": ".mlp:in"}),
    _Family(
        r"phi-([12]|1_5)$", "layers",
        {**_STREAM, **_SELF_ATTN, **_MLP, "mlp.hook_post": ".mlp.fc2:in", "attn.hook_z": ".self_attn.dense:in"},
    ),
    _Family(r"phi-[34]\b.*", "layers", {**_LLAMA, "mlp.hook_post": ".mlp.down_proj:in"}),
    _Family(r"(mixtral|llama-4|qwen[\d.]*-moe|qwen3-next|qwen3\.\d|qwen3-\d+b-a\d+b)\b.*", "layers", _STREAM),
    _Family(
        r"(meta-|code)?llama\b.*|gemma-\d+b.*|mistral-.*|qwen(1\.5|2|2\.5|3)\b.*|qwq-.*|yi-.*|smollm.*|olmo-\d+b.*"
        r"|deepseek-r1-distill-.*",
        "layers", {**_LLAMA, **_GATED},
    ),
    _Family(
        r"opt-(?!350m).*", "decoder.layers",
        {
            **_STREAM, **_SELF_ATTN, "hook_mlp_out": ".fc2", "mlp.hook_in": ".fc1:in", "mlp.hook_pre": ".fc1",
            "mlp.hook_post": ".fc2:in", "hook_resid_mid": ".final_layer_norm:in",
            "attn.hook_z": ".self_attn.out_proj:in",
        },
    ),
    _Family(
        r"(distil)?bert-(base|large)-.*", "encoder.layer",
        {
            "hook_normalized_resid_post": "", "hook_resid_pre": _IN, "hook_resid_post": ".output.LayerNorm:in",
            "hook_resid_mid": ".attention.output.LayerNorm:in", "hook_attn_out": ".attention.output.dense",
            "hook_mlp_out": ".output.dense", "mlp.hook_in": ".intermediate:in", "mlp.hook_post": ".output.dense:in",
            "attn.hook_z": ".attention.output.dense:in",
        },
        "bert",
    ),
)  # fmt: skip

_OF_BLOCKS = {
    "h": _GPT,
    "layers": {**_STREAM, "mlp.hook_in": ".mlp:in"},
    "decoder.layers": _STREAM,
    "encoder.layer": {"hook_normalized_resid_post": "", "hook_resid_pre": _IN},
}
"""What is so in every family that calls its blocks by a name, where the model is not known."""

_IN_FRONT = r"(?:(?:model|transformer|gpt_neox|bert|language_model|text_model)\.)*"
_PATH = rf"{_IN_FRONT}((?:encoder\.layer|decoder\.layers|layers|h)(?=\.\d))\.(\d+)((?:\.\w+)*(?:{_IN})?)"
_BRIDGE = {"hook_out": "hook_resid_post", "hook_in": "hook_resid_pre"}
"""What transformer-lens calls the same since its version 3."""

_OF_ANY_MODEL = rf"(?:[A-Za-z_]\w*\.)*(?:h|layers?|blocks?)\.\d+(?:\.[A-Za-z_]\w*)*(?:{_IN})?"

_OWNERS = (
    (r"gpt2(-medium|-large|-xl)?|distilgpt2", ""),
    (r"(pythia|gpt-neo|gpt-neox|gpt-j)-\d.*", "EleutherAI/"),
    (r"(med)?gemma-.*", "google/"),
    (r"(Meta-)?Llama-[34].*", "meta-llama/"),
    (r"Qwen.*", "Qwen/"),
    (r"(Mistral|Mixtral)-.*", "mistralai/"),
    (r"TinyStories-.*", "roneneldan/"),
    (r"bert-.*", "google-bert/"),
    (r"opt-\d.*", "facebook/"),
    (r"[Pp]hi-\d.*", "microsoft/"),
)
_SHORT = {"gpt2-small": "gpt2", "gpt2-xs": "distilgpt2", "pythia": "pythia-70m", "mistral-7b": "Mistral-7B-v0.1"}


def hookpoint_of(hook_name: str, model: str | None) -> str | None:
    """Return the hookpoint that transformer-lens calls so, as h.6.mlp:in; None where no module has it.

    Args:
        hook_name: such as blocks.6.hook_resid_post.
        model: its name, here or there; None where it is not known.
    """
    found, family = re.fullmatch(r"blocks\.(\d+)\.([\w.]+)", hook_name), _family(model)
    if found is None or family is None:
        return None
    number, hook = found.groups()
    place = family.places.get(_BRIDGE.get(hook, hook))
    return None if place is None else f"{family.blocks}.{int(number)}{place}"


def hookpoints_of(hook_names: Sequence[str], model: str | None) -> str | None:
    """Return the hookpoints of several, as h.6.mlp:in, h.6.mlp; None where one of them has none."""
    named = [hookpoint_of(name, model) for name in hook_names]
    return None if None in named else ", ".join(map(str, named))


def is_hookpoint(name: str) -> bool:
    """Tell whether a name looks as the path of a block, or of a module in one: h.6, model.layers.6.mlp:in."""
    return re.fullmatch(_OF_ANY_MODEL, name) is not None


def hook_name_of(hookpoint: str, model: str | None = None) -> str | None:
    """Return what transformer-lens calls a hookpoint, as blocks.6.hook_resid_post; None where it has no name for it.

    Args:
        hookpoint: the path of a module, of its base model or of all of it; with ``:in`` behind, for its input.
        model: its name, here or there. Where it is None, or of no family that is known, only what is the same for all
            families has a name.
    """
    found, family = re.fullmatch(_PATH, hookpoint.removesuffix(_OUT)), _family(model)
    if found is None:
        return None
    blocks, number, place = found.groups()
    places = _OF_BLOCKS[blocks] if family is None else family.places
    if family is not None and family.blocks != blocks:
        return None
    hook = next((name for name, each in places.items() if each == place), None)
    return None if hook is None else f"blocks.{int(number)}.{hook}"


def path_in_model(hookpoint: str, model: str | None) -> str:
    """Return a hookpoint of a base model as one of the model that predicts tokens: h.6 is transformer.h.6.

    It stays as it is where the family of the model is not known.
    """
    family = _family(model)
    if family is None or not hookpoint.startswith(f"{family.blocks}."):
        return hookpoint
    return f"{family.root}.{hookpoint}"


def layer_of(name: str) -> int | None:
    """Return the number of the block that a hookpoint or a hook of transformer-lens lies in; None where it is in none.

    Args:
        name: such as layers.6.mlp:in, model.layers.6 or blocks.6.hook_resid_post.
    """
    found = re.search(r"(?:^|\.)(\d{1,9})(?=[.:]|$)", name)
    return None if found is None else int(found[1])


def model_of(name: str) -> str:
    """Return what the hub calls a model of transformer-lens: gpt2-small is gpt2; a name that is not known stays."""
    short = _SHORT.get(name, name)
    owner = next((owner for names, owner in _OWNERS if re.fullmatch(names, short)), None)
    return name if owner is None else f"{owner}{short}"


def model_name_of(model: str) -> str:
    """Return what transformer-lens calls a model of the hub, by which it loads it: openai-community/gpt2 is gpt2."""
    return model.removeprefix("openai-community/").removeprefix("distilbert/")


def _family(model: str | None) -> _Family | None:
    name = (model or "").rpartition("/")[2].lower()
    return next((family for family in _FAMILIES if re.fullmatch(family.models, name)), None)
