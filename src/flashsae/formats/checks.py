"""What files of others must be before anything is made of them: names, shapes and dtypes of tensors, sizes, numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashsae.errors import CheckpointError

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
"""Of parameters."""
_SMALL = 1 << 20


def glimpse(path: Path) -> dict[str, Any]:
    """Return the object in a small JSON file, to tell formats apart by; {} of whatever it cannot be read from."""
    with suppress(OSError, ValueError, RecursionError):
        if path.is_file() and path.stat().st_size <= _SMALL:
            content = json.loads(path.read_text("utf-8"))
            return content if isinstance(content, dict) else {}
    return {}


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


def parameters(path: Path, tensors: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Return tensors that are these and no others, of one dtype: the narrowest that holds all of them exactly.

    A single number takes the dtype of the others where it can be told in it.

    Raises:
        CheckpointError: one is missing, left over, of another shape, or of no dtype that parameters have.
    """
    found = {name: list(value.shape) for name, value in tensors.items() if isinstance(value, Tensor)}
    expected = {name: list(shape) for name, shape in shapes.items()}
    if found != expected or len(found) != len(tensors):
        missing, more = sorted(set(expected) - set(found)), sorted(map(ascii, set(tensors) - set(expected)))
        wrong = next((name for name in expected if name in found and found[name] != expected[name]), "")
        told = f"{wrong} is {found[wrong]} and not {expected[wrong]}" if wrong else ""
        told = f"{', '.join(more)[:80]} is nothing that it has" if more else told
        told = f"{', '.join(missing)} is missing" if missing else told
        raise CheckpointError(f"{path} does not fit the settings beside it: {told}. Save the SAE again.")
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise CheckpointError(
                f"{path}: {name} is of {_dtype(tensor)}, where parameters are floats. Convert it first."
            )
    whole = [tensor.dtype for tensor in tensors.values() if tensor.dim()]
    dtype = reduce(torch.promote_types, whole)
    single = [tensor for tensor in tensors.values() if not tensor.dim()]
    if any(not torch.equal(each.double(), each.to(dtype).double()) and not each.isnan() for each in single):
        dtype = reduce(torch.promote_types, [each.dtype for each in single], dtype)
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


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
