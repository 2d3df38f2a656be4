"""Whether the weights of a model fit into memory, told before they are loaded."""

from __future__ import annotations

import json
from collections.abc import Iterable
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flashsae.backend import memory_bytes
from flashsae.errors import ConfigError, require
from flashsae.lm.options import LoadOptions
from flashsae.lm.place import model_place

_CPU = torch.device("cpu")


def check_room(name: str, config: Any, dtype: torch.dtype, options: LoadOptions) -> None:
    """Raise ConfigError where the weights of a model are more than the memory; where they are spread, they may be.

    Args:
        name: of the model.
        config: of the model, as transformers reads it.
        dtype: that they will have.
        options: how it is loaded.
    """
    if options.device_map is not None or options.quantize is not None:
        return
    place = Path(model_place(name)) / (options.subfolder or "")
    n_parameters = _in_files(place.glob("*.safetensors")) if place.is_dir() else _by_config(config)
    _check(name, n_parameters * dtype.itemsize, _CPU)


def moved(name: str, model: nn.Module, device: torch.device) -> nn.Module:
    """Return a model on a device.

    Raises:
        ConfigError: it has more weights than the device has memory.
    """
    _check(name, sum(p.numel() * p.element_size() for p in model.parameters()), device)
    return model.to(device)


def _check(name: str, size: int, device: torch.device) -> None:
    limit = memory_bytes(device)
    if limit is not None and size > limit:
        raise ConfigError(
            f"model: the weights of {name} take {size / 1e9:.1f} GB, and {device} has {limit / 1e9:.1f} GB of memory. "
            "Give --model-dtype bfloat16 if that is not what they have, --device-map auto, --quantize 4bit, or name a "
            "smaller model."
        )


def _in_files(files: Iterable[Path]) -> int:
    """Return how many numbers safetensors files hold, by their headers; those that cannot be read are not counted."""
    total = 0
    for path in files:
        try:
            with path.open("rb") as file:
                header = json.loads(file.read(min(int.from_bytes(file.read(8), "little"), path.stat().st_size)))
            total += sum(prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, MemoryError):
            continue  # loading it says what is wrong
    return total


def _by_config(config: Any) -> int:
    """Return how many parameters a model has by its config; 0 where that does not tell."""
    transformers = require("transformers", "hf")
    try:
        with torch.device("meta"):
            return sum(p.numel() for p in transformers.AutoModel.from_config(config).parameters())
    except Exception:  # of models with code of their own, and whatever does not like devices without memory
        return 0
