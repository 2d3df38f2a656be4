"""Which part of a model reads text: of what was loaded, wrapped or given, the module that a forward calls."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from flashsae.errors import ConfigError

_READERS = ("text_model", "language_model", "text_encoder")
"""What the side of text is called in models of several kinds of input."""
_WRAPPED = {"OptimizedModule": "_orig_mod", "DataParallel": "module", "DistributedDataParallel": "module"}


def bare(model: nn.Module) -> nn.Module:
    """Return the base of a model: without head, without the adapters' own wrapper, uncompiled, of one replica.

    Raises:
        ConfigError: an adapter adds tokens, which are no part of the model, or weights have no numbers.
    """
    inner = model
    while True:
        wrapped = _inside(inner)
        if wrapped is None and (peft := getattr(inner, "peft_config", None)) and hasattr(inner, "get_base_model"):
            if any(getattr(each, "is_prompt_learning", False) for each in peft.values()):
                raise ConfigError(
                    "model: its adapter adds tokens to what the model reads, and these make no rows; expected one "
                    "that changes weights, such as LoRA."
                )
            wrapped = inner.get_base_model()  # type: ignore[operator]
        if wrapped is None:
            break
        inner = wrapped
    base: nn.Module = getattr(inner, "base_model", inner)
    return base


def unwrapped(model: nn.Module) -> nn.Module:
    """Return a model uncompiled, and of one replica, with its head."""
    while (inside := _inside(model)) is not None:
        model = inside
    return model


def _inside(model: nn.Module) -> nn.Module | None:
    found: nn.Module | None = getattr(model, _WRAPPED.get(type(model).__name__, ""), None)
    return found


def reader_of(model: nn.Module, names: Iterable[str]) -> nn.Module:
    """Return the part of a model that reads inputs of some names: all of it, its encoder, or one of its towers.

    Args:
        model: the model.
        names: of the inputs.
    """
    given = set(names)
    if is_of_two(model) and "decoder_input_ids" not in given and hasattr(model, "get_encoder"):
        encoder: nn.Module = model.get_encoder()  # type: ignore[operator]
        return encoder
    if getattr(model, "main_input_name", None) in {None, *given}:
        return model
    towers = (part for part in model.modules() if part is not model and hasattr(part, "main_input_name"))
    return next((part for part in towers if part.main_input_name in given), model)


def text_reader(model: nn.Module, side: str | None = None) -> nn.Module:
    """Return the part of a model that reads text alone: all of it, one of two halves, or the side of text.

    Args:
        model: the base model.
        side: of an encoder and a decoder; None is the encoder.
    Raises:
        ConfigError: there is none.
    """
    reader = model
    if is_of_two(model):
        reader = model.get_decoder() if side == "decoder" else model.get_encoder()  # type: ignore[operator]
        wanted = getattr(model if side == "decoder" else reader, "main_input_name", "input_ids")
    else:
        if side == "decoder":
            raise ConfigError(f"side: {type(model).__name__} has no encoder beside a decoder; leave side out.")
        if isinstance(part := getattr(model, "text_model", None), nn.Module):
            reader = part
        wanted = getattr(reader, "main_input_name", "input_ids")
        if wanted != "input_ids":
            parts = (getattr(model, name, None) for name in _READERS)
            reader = next((part for part in parts if isinstance(part, nn.Module) and _reads_ids(part)), reader)
            wanted = getattr(reader, "main_input_name", "input_ids")
    if wanted != "input_ids":
        raise ConfigError(f"model: {type(model).__name__} reads {wanted}, not text; name a language model.")
    return reader


def is_of_two(model: nn.Module) -> bool:
    """Tell whether a model has an encoder and a decoder."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def text_paths(model: nn.Module, side: str | None = None) -> list[str]:
    """Return what may be left out of module paths: the part that reads text, and the language model inside it."""
    own = [name for name in _READERS if isinstance(getattr(model, name, None), nn.Module)]
    return [path for path in dict.fromkeys((path_of(text_reader(model, side), model), *own)) if path]


def _reads_ids(part: nn.Module) -> bool:
    return getattr(part, "main_input_name", "") == "input_ids"


def path_of(part: nn.Module, model: nn.Module) -> str:
    """Return the path of a module in a model; "" of the model itself."""
    return next((name for name, module in model.named_modules() if module is part), "")


def context_limit(model: nn.Module, tokenizer: Any, side: str | None = None) -> float:
    """Return how many tokens a model reads at once, as far as it or its tokenizer says so."""
    reader = text_reader(model, side)
    settings = _of_text(getattr(reader, "config", None))
    positions = getattr(settings, "max_position_embeddings", None)
    for module in reader.modules():
        # the family of RoBERTa counts positions from behind the number of the padding token
        own = getattr(module, "position_embeddings", None)
        if isinstance(own, nn.Embedding) and own.padding_idx is not None and own.num_embeddings == positions:
            positions = own.num_embeddings - own.padding_idx - 1
    if side == "decoder" and isinstance(positions, int):
        positions -= 1  # for its start token
    limits = (positions, getattr(tokenizer, "model_max_length", None))
    return min((limit for limit in limits if isinstance(limit, int | float) and limit > 0), default=float("inf"))


def _of_text(settings: Any) -> Any:
    """Return the part of a config that tells of text."""
    try:
        return settings.get_text_config()
    except (AttributeError, ValueError):  # none, an older one, or one with several such parts
        return settings


def vocabulary_size(model: nn.Module, side: str | None = None) -> int | None:
    """Return how many token ids a model has embeddings of; None where it does not say so."""
    try:
        embeddings = text_reader(model, side).get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    return getattr(embeddings, "num_embeddings", None)


def device_of(model: nn.Module, name: str) -> torch.device:
    """Return the device that a model takes its inputs on.

    Raises:
        ConfigError: some of its weights have no numbers, and nothing brings these when it runs.
    """
    for path, module in model.named_modules():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if any(tensor.is_meta for tensor in own) and not getattr(getattr(module, "_hf_hook", None), "offload", False):
            raise ConfigError(
                f"model: {path or name} lies on the device meta, where weights have no numbers; load them, or give "
                "the name of the model and --device-map auto."
            )
    devices = (parameter.device for parameter in model.parameters() if not parameter.is_meta)
    hooks = (getattr(module, "_hf_hook", None) for module in model.modules())
    runs_on = (getattr(hook, "execution_device", None) for hook in hooks)
    return next(devices, None) or torch.device(next((device for device in runs_on if device is not None), "cpu"))


@contextmanager
def as_it_is_used(model: nn.Module) -> Iterator[None]:
    """Run a model as for inference: without dropout, uncompiled, as a whole; put back afterwards what that changes."""
    modules = list(model.modules())
    in_training = [module for module in modules if module.training]
    is_compiled = any(getattr(module, "_compiled_call_impl", None) is not None for module in modules)
    for module in in_training:
        module.training = False
    try:
        with torch.compiler.set_stance("force_eager") if is_compiled else nullcontext():
            yield
    finally:
        for module in in_training:
            module.training = True
