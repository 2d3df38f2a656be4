"""Language models as modules: loading one with its tokenizer."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from flashsae.errors import ConfigError, require
from flashsae.lm.adapters import account_of, base_and_adapter, put_on
from flashsae.lm.options import PLAIN, LoadOptions
from flashsae.lm.place import model_place, needs_code, not_loaded, quiet_transformers, read_config, reason_of
from flashsae.lm.room import check_room

_WITH_HEAD = (
    "AutoModelForCausalLM",
    "AutoModelForMaskedLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForImageTextToText",
    "AutoModelForMultimodalLM",
)
"""Classes of transformers for models that are there with a head alone."""


@contextmanager
def _without_report() -> Iterator[None]:
    """Keep back transformers' table of names that did not meet, of which most concern heads; other warnings pass."""

    def passes(record: logging.LogRecord) -> bool:
        return not re.search("LOAD REPORT|Some weights of", record.getMessage())

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(passes)
    try:
        yield
    finally:
        logger.removeFilter(passes)


@dataclass(frozen=True)
class Loading:
    """How the names of a checkpoint met those of a model, by transformers' own account.

    Args:
        missing: parameters of the model that the checkpoint lacks; they are random.
        unexpected: what the checkpoint holds beside.
        mismatched: parameters whose shapes differ; they are random.
    """

    missing: frozenset[str] = frozenset()
    unexpected: frozenset[str] = frozenset()
    mismatched: frozenset[str] = frozenset()


def load_language_model(name: str, dtype: torch.dtype, options: LoadOptions = PLAIN) -> tuple[nn.Module, Any]:
    """Load a base model, without any head, and its tokenizer, on the CPU or where `options` spread it.

    Args:
        name: ``"minilm"``, a folder, or a name on the hub.
        dtype: of the parameters.
        options: revision, adapter and the like.
    Returns:
        model and tokenizer. Weights that the checkpoint lacks are random; transformers warns of them.
    Raises:
        ConfigError: there is no such model, it is damaged, has no tokenizer or does not fit into memory, or it brings
            code along that nobody said may run.
        MissingExtraError: transformers, a package that `options` need, or the weights of ``"minilm"`` are not
            installed.
    """
    model, tokenizer, _ = _load(name, dtype, options)
    return model, tokenizer


def load_with_account(name: str, dtype: torch.dtype, options: LoadOptions = PLAIN) -> tuple[nn.Module, Any, Loading]:
    """Load as `load_language_model`; instead of warning, return which weights came from the checkpoint."""
    with _without_report():
        return _load(name, dtype, options)


def load_image_model(name: str, dtype: torch.dtype, options: LoadOptions = PLAIN) -> tuple[nn.Module, Any, Loading]:
    """Load a base model that reads images, and its image processor; arguments and errors as `load_language_model`.

    Raises:
        ConfigError: also where the model reads no images.
    """
    with _without_report():
        return _load(name, dtype, options, of_images=True)


def reads_images(name: str, options: LoadOptions = PLAIN) -> tuple[bool, bool]:
    """Tell whether a model reads images, and whether it does so beside text, by its config.

    Raises:
        ConfigError: there is no such model.
    """
    base, _, options = base_and_adapter(name, options)
    config = read_config(base, options)
    return _main_input(config) == "pixel_values", getattr(config, "vision_config", None) is not None


def _main_input(config: Any) -> str:
    """Return what a model reads first."""
    transformers = require("transformers", "hf")
    known = getattr(getattr(transformers, _auto_class(config), None), "_model_mapping", {})
    return str(getattr(known[type(config)], "main_input_name", "input_ids")) if type(config) in known else "input_ids"


def _image_processor(name: str, place: str, options: LoadOptions) -> Any:
    transformers = require("transformers", "hf")
    require("PIL.Image", "vision")
    try:
        return transformers.AutoImageProcessor.from_pretrained(place, **options.of_place)
    except Exception as error:  # a boundary: no file, a damaged one, an unknown kind
        if needs_code(error):
            raise not_loaded(name, error) from error
        raise ConfigError(
            f"model: {name} has no image processor that can be read ({reason_of(error)}), and the dataset is images: "
            "put its preprocessor_config.json beside the weights, or name a model of images."
        ) from error


def _load(
    name: str, dtype: torch.dtype, options: LoadOptions, *, of_images: bool = False
) -> tuple[nn.Module, Any, Loading]:
    base, adapter, options = base_and_adapter(name, options)
    config = read_config(base, options)
    arguments = options.of_weights(dtype, config, name)
    with quiet_transformers() as transformers:
        of_adapter = [] if adapter in (None, options.adapter) else [adapter]
        places = (*of_adapter, model_place(base))
        if of_images:
            tokenizer = _image_processor(name, places[-1], options)
        else:
            tokenizer = _tokenizer(name, places, options, is_of_images=_main_input(config) == "pixel_values")
        check_room(name, config, dtype, options)
        version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
        dtype_name = "dtype" if version >= (4, 56) else "torch_dtype"
        arguments |= {dtype_name: dtype, "output_loading_info": True, "ignore_mismatched_sizes": True}
        model, told = _weights(base, config, arguments | options.of_place)
        if adapter is not None:
            also = put_on(model, adapter, base)
            told = {kind: keys | also[kind] for kind, keys in told.items()}
    return model, tokenizer, Loading(*map(frozenset, told.values()))


def _weights(name: str, config: Any, arguments: dict[str, Any]) -> tuple[nn.Module, dict[str, set[str]]]:
    """Load a base; where there is none, the part of a model with a head that is one, or else all of it."""
    transformers = require("transformers", "hf")
    kind = _auto_class(config)
    # a boundary: missing file, no network, damaged weights, unknown architecture, and no base for these errors
    try:
        model, told = getattr(transformers, kind).from_pretrained(model_place(name), **arguments)
    except Exception as error:
        raise not_loaded(name, error) from error
    base = getattr(model, "base_model", model)
    prefix = "" if base is model else f"{model.base_model_prefix}."
    return base, {kind: {key.removeprefix(prefix) for key in keys} for kind, keys in account_of(told).items()}


def _auto_class(config: Any) -> str:
    """Return the class of transformers that loads a model: that of bases, or the first that knows a kind of head."""
    transformers = require("transformers", "hf")
    own = getattr(config, "auto_map", None) or {}
    for kind in ("AutoModel", *_WITH_HEAD):
        if kind in own or type(config) in getattr(getattr(transformers, kind, None), "_model_mapping", ()):
            return kind
    return "AutoModel"


def _tokenizer(name: str, places: Iterable[str], options: LoadOptions, *, is_of_images: bool) -> Any:
    """Load the tokenizer from the first of some places that has one; from above a subfolder if that has none."""
    transformers = require("transformers", "hf")
    reason = ""
    for place in places:
        for arguments in (options.of_place, {**options.of_place, "subfolder": ""}):
            try:
                tokenizer = transformers.AutoTokenizer.from_pretrained(place, **arguments)
            except Exception as error:
                if needs_code(error):
                    raise not_loaded(name, error) from error
                reason = reason or reason_of(error)
                continue
            if len(tokenizer) > len(special_ids(tokenizer)):
                return tokenizer
    if is_of_images:
        raise ConfigError(
            f"model: {name} reads images, not text: name a folder of them as the dataset (.png, .jpg, .webp or .bmp), "
            "or a language model."
        )
    raise _no_tokenizer(name, reason or "no vocabulary")


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Return the ids of the special tokens: the named ones, and those marked special among the added ones."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return frozenset(tokenizer.all_special_ids) | {number for number, token in added.items() if token.special}


def _no_tokenizer(name: str, reason: str) -> ConfigError:
    return ConfigError(
        f"model: {name} has no tokenizer that can be read ({reason}). FlashSAE reads text: put the files of the "
        "tokenizer beside the weights, or name a model that has one."
    )
