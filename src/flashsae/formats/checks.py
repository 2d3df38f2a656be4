"""What files of others must be before anything is made of them: sizes and numbers that there can be."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashsae.errors import CheckpointError, ConfigError

_SMALL = 1 << 20


def glimpse(path: Path) -> dict[str, Any]:
    """Return the object in a small JSON file, to tell formats apart by; {} of whatever it cannot be read from."""
    with suppress(OSError, ValueError, RecursionError):
        if path.is_file() and path.stat().st_size <= _SMALL:
            content = json.loads(path.read_text("utf-8"))
            return content if isinstance(content, dict) else {}
    return {}


def without_nan(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a file says of a training, with null for numbers that JSON has no words for, though Python has."""
    plain: dict[str, Any] = json.loads(json.dumps(content), parse_constant=lambda _: None)
    return plain


def matrix(path: Path, tensors: Mapping[str, Any], name: str) -> tuple[int, int]:
    """Return the two sizes of a tensor, which others go by.

    Raises:
        CheckpointError: there is none, or it is no matrix.
    """
    tensor = tensors.get(name)
    if not isinstance(tensor, Tensor) or tensor.dim() != 2 or 0 in tensor.shape:
        got = f"{list(tensor.shape)}" if isinstance(tensor, Tensor) else "nothing"
        raise CheckpointError(f"{path} holds no SAE: expected a matrix {name}, got {got}. Save the SAE again.")
    return tensor.shape[0], tensor.shape[1]


def of_one_dtype(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return parameters, contiguous, in the narrowest dtype that holds all of them exactly.

    A single number takes the dtype of the others wherever that tells it.
    """
    dtype = reduce(torch.promote_types, [tensor.dtype for tensor in tensors.values() if tensor.dim()])
    for each in tensors.values():
        if not each.dim() and not each.isnan() and each.double() != each.to(dtype).double():
            dtype = torch.promote_types(dtype, each.dtype)
    return {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}


def number(path: Path, name: str, value: object) -> float:
    """Return a number that may be a tensor of one.

    Raises:
        CheckpointError: it is none.
    """
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        value = value.item()
    if not isinstance(value, int | float) or isinstance(value, bool):
        got = "nothing" if value is None else f"a {type(value).__name__}"
        raise CheckpointError(f"{path}: {name}: expected a number, got {got}. Save the SAE again.")
    return value


def active(path: Path, k: float, d_sae: int) -> int:
    """Return k, the number of latents that a token selects.

    Raises:
        CheckpointError: it is no number of latents that there are.
    """
    if not 1 <= k <= d_sae or k != int(k):
        raise CheckpointError(
            f"{path}: k: expected a whole number from 1 to {d_sae} as d_sae, got {k}. Save the SAE again."
        )
    return int(k)


def folder_name(name: str) -> str:
    """Return what the folder of an SAE is called, by its hookpoint or the name that it has beside others.

    Not every file system has colons in names. A name of several parts, as layers.3/seed1, is of folders in each other.

    Raises:
        ConfigError: it would lead out of the folder that it is to be in, or is no name that a folder can have.
    """
    told = name.replace(":", "@").replace(", ", "+")
    if not all(re.fullmatch(r"\w[\w.+@-]{0,199}", part) for part in told.split("/")):
        raise ConfigError(f"hookpoint: expected a name that a folder can have, got {ascii(name)[:60]}.")
    return told
