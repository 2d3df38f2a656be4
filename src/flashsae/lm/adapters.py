"""Adapters, which peft makes: what they belong to, and putting one onto its model."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn

from flashsae.errors import ConfigError
from flashsae.lm.options import LoadOptions
from flashsae.lm.place import model_place, not_loaded, reason_of

CONFIG = "adapter_config.json"
_CODE = "megatron_config"
"""What makes peft import a module that an adapter names."""


def base_and_adapter(name: str, options: LoadOptions) -> tuple[str, str | None, LoadOptions]:
    """Return the name of a base model, what to put onto it, and how that base is loaded.

    Args:
        name: of the model, or a folder that holds an adapter and names its base.
        options: may name an adapter.
    Raises:
        ConfigError: an adapter is damaged, does not say what it belongs to or stands beside another one, or peft is
            not installed.
    """
    inside = (Path(model_place(name)) / (options.subfolder or "")) / CONFIG
    if not inside.is_file():
        if options.adapter is not None:
            _check(options.adapter)
        return name, options.adapter, options
    if options.adapter is not None:
        raise ConfigError(f"adapter: expected none beside {name}, which is an adapter itself; name its base as model.")
    base = _check(name, inside.parent).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ConfigError(
            f"model: {name} holds an adapter that does not say of which model; name that as model, and this as adapter."
        )
    return base, str(inside.parent), replace(options, subfolder=None)


def _check(name: str, folder: Path | None = None) -> dict[str, Any]:
    """Return the config of an adapter: a folder, or a name on the hub."""
    if find_spec("peft") is None:
        raise ConfigError(
            f"model: {name} holds an adapter, which only the package peft can read: pip install peft, or merge the "
            "adapter into its model and name that."
        )
    try:
        held = json.loads(Path(_file(str(folder or model_place(name)))).read_text("utf-8"))
        held.get("peft_type")
    except Exception as error:  # missing, no network, no JSON, and no base for these errors
        raise ConfigError(
            f"adapter: cannot read the {CONFIG} of {name} ({reason_of(error)}). Expected a folder that peft wrote, or "
            "a name on the hub."
        ) from error
    if held.get(_CODE) is not None:
        raise ConfigError(f"adapter: {name} names Python modules to import ({_CODE}), which FlashSAE does not do.")
    return dict(held)


def _file(place: str) -> str:
    from transformers.utils.peft_utils import find_adapter_config_file

    found = find_adapter_config_file(place)
    if found is None:
        raise FileNotFoundError("there is none")
    return str(found)


def revision_of(name: str) -> str | None:
    """Return the name and the revision of an adapter on the hub; None of a folder."""
    from transformers.utils.hub import extract_commit_hash

    place = model_place(name)
    return None if Path(place).is_dir() else f"{name} {extract_commit_hash(_file(place), None)}"


def put_on(model: nn.Module, adapter: str, name: str) -> dict[str, set[str]]:
    """Put an adapter onto a model; return which keys were missing, unexpected or mismatched, by these words.

    Raises:
        ConfigError: it does not fit, or is of a kind that adds tokens instead of weights.
    """
    place = model_place(adapter)
    try:
        told = model.load_adapter(place)  # type: ignore[operator]
    except Exception as error:  # whatever peft makes of files that are missing, damaged or of another model
        raise not_loaded(f"{adapter} onto {name}", error) from error
    return account_of(told)


def account_of(told: Any) -> dict[str, set[str]]:
    """Return which keys were missing, unexpected and mismatched, in this order, by transformers' account of it."""
    found = told if isinstance(told, dict) else vars(told or object)
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    return {kind: {key if isinstance(key, str) else key[0] for key in found.get(kind, ())} for kind in kinds}
