"""How a model is loaded, beside its name: settings that become arguments of transformers."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from flashsae.errors import ConfigError, MissingExtraError
from flashsae.settings.reading import ReadingConfig

_OWN = {
    **dict.fromkeys(("dtype", "torch_dtype"), "model_dtype"),
    **dict.fromkeys(("quantization_config", "load_in_8bit", "load_in_4bit"), "quantize"),
    **{name: name for name in ("revision", "subfolder", "device_map", "trust_remote_code")},
}
"""Arguments of transformers that are settings by themselves."""
_REFUSED = {
    "token": "log in with hf auth login, so that no settings file holds a secret",
    "gguf_file": "FlashSAE reads no GGUF: name the model that the file was made from",
    **dict.fromkeys(("config", "state_dict"), "give such objects in a model that is loaded already"),
    **dict.fromkeys(("output_loading_info", "ignore_mismatched_sizes", "return_unused_kwargs"), "FlashSAE sets it"),
}


@dataclass(frozen=True)
class LoadOptions:
    """How a model is loaded, beside its name; the settings of the same names explain each.

    Args:
        revision, subfolder, quantize, device_map, trust_remote_code, adapter: as in `ReadingConfig`.
        model_kwargs: NAME=VALUE each.
    Raises:
        ConfigError: `model_kwargs` has what is a setting by itself, or cannot be given.
    """

    revision: str | None = None
    subfolder: str | None = None
    model_kwargs: tuple[str, ...] = ()
    quantize: str | None = None
    device_map: str | None = None
    trust_remote_code: bool = False
    adapter: str | None = None

    def __post_init__(self) -> None:
        for name in keyword_arguments(self.model_kwargs):
            if name in _OWN:
                raise ConfigError(f"model_kwargs: expected no {name}, which is the setting {_OWN[name]}; give that.")
            if name in _REFUSED:
                raise ConfigError(f"model_kwargs: expected no {name}: {_REFUSED[name]}.")

    @classmethod
    def of(cls, config: ReadingConfig) -> LoadOptions:
        """Return what settings say of it; what is left open is at its default."""
        return cls(
            revision=config.revision,
            subfolder=config.subfolder,
            model_kwargs=config.model_kwargs or (),
            quantize=config.quantize,
            device_map=config.device_map,
            trust_remote_code=bool(config.trust_remote_code),
            adapter=config.adapter,
        )

    @property
    def of_place(self) -> dict[str, Any]:
        """Arguments that say which files are read, for config, tokenizer and weights; code is never run unasked."""
        told = {"revision": self.revision, "subfolder": self.subfolder}
        given = {name: value for name, value in told.items() if value is not None}
        return {**given, "trust_remote_code": self.trust_remote_code}

    def of_weights(self, dtype: torch.dtype, config: Any = None, name: str = "it") -> dict[str, Any]:
        """Return the arguments that the weights take beside those of the place.

        Args:
            dtype: of products.
            config: of the model, which may be quantised already.
            name: of the model, for messages.
        Raises:
            ConfigError: weights that are quantised already are to be so again.
            MissingExtraError: a package is needed that is not installed.
        """
        method = quantized_by(config)
        if method and self.quantize is not None:
            raise ConfigError(f"quantize: the weights of {name} are quantised already, by {method}; leave it out.")
        arguments = keyword_arguments(self.model_kwargs)
        if self.device_map is not None:
            _need(("accelerate",), "device_map")
            arguments["device_map"] = self.device_map
        if self.quantize is not None:
            _need(("bitsandbytes", "accelerate"), "quantize")
            arguments["quantization_config"] = quantization(self.quantize, dtype)
            arguments.setdefault("device_map", "auto")  # weights of a few bits are made where they stay
        return arguments


def quantization(bits: str, dtype: torch.dtype) -> Any:
    """Return the settings of bitsandbytes for weights of 8 bits, or of 4 in its NF4 with products in `dtype`."""
    from transformers import BitsAndBytesConfig

    if bits == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def quantized_by(config: Any) -> str | None:
    """Return the method by which the weights of a model were quantised when they were saved; None if they were not."""
    told = getattr(config, "quantization_config", None)
    held = told if isinstance(told, dict) else getattr(told, "__dict__", {})
    method = held.get("quant_method", "a method without a name")
    return str(getattr(method, "value", method)) if held else None


def quantized_warning(name: str, model: nn.Module) -> tuple[str, ...]:
    """Return a sentence where the weights of a model are quantised; none where they are not."""
    method = quantized_by(getattr(model, "config", None))
    return (quantized_sentence(name, method),) if method else ()


def quantized_sentence(name: str, method: str) -> str:
    """Return what to say of activations of quantised weights."""
    return (
        f"the weights of {name} are quantised ({method}): its activations, and so the latents that are found in them, "
        "are not those of the model itself."
    )


def keyword_arguments(pairs: Iterable[str]) -> dict[str, Any]:
    """Return what NAME=VALUE stands for: a value is what JSON makes of it, or else the word itself."""
    return {name: _value(word) for name, _, word in (pair.partition("=") for pair in pairs)}


def _value(word: str) -> Any:
    try:
        return json.loads(word)
    except ValueError:
        return {"True": True, "False": False, "None": None}.get(word, word)


def _need(packages: Iterable[str], setting: str) -> None:
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise MissingExtraError(
            f"{setting}: this needs the package {' and '.join(missing)}, which is not installed: pip install "
            f"{' '.join(missing)}"
        )


PLAIN = LoadOptions()
"""A model as it is saved, on one device, without code of its own."""
