"""Checks of arguments that the operations share, made before anything is computed."""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor

from flashsae.errors import ConfigError, DtypeError, ShapeError
from flashsae.precision import Precision as Precision

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_shape(name: str, tensor: Tensor, expected: tuple[int | str, ...]) -> None:
    """Raise ShapeError unless `tensor` has this shape; a string in it names a size that is free."""
    if not isinstance(tensor, Tensor):
        raise DtypeError(f"{name}: expected a tensor, got {type(tensor).__name__}.")
    fits = len(expected) == tensor.dim() and all(
        isinstance(want, str) or want == size for want, size in zip(expected, tensor.shape)
    )
    if not fits:
        wanted = ", ".join(str(size) for size in expected)
        raise ShapeError(f"{name}: expected the shape [{wanted}], got {list(tensor.shape)}.")


def check_float(
    name: str, tensor: Tensor, like: Tensor | None = None, like_name: str = "", *, or_dtype: torch.dtype | None = None
) -> None:
    """Raise DtypeError unless `tensor` is float and, where given, of the dtype (or `or_dtype`) and device of `like`."""
    if tensor.dtype not in FLOATS:
        raise DtypeError(f"{name}: expected a float tensor, got {tensor.dtype}. Convert it: {name}.float().")
    if like is not None and tensor.dtype not in (like.dtype, or_dtype):
        raise DtypeError(
            f"{name}: expected {like.dtype}, the dtype of {like_name}, got {tensor.dtype}. "
            f"Convert it: {name}.to({like_name}.dtype)."
        )
    if like is not None and tensor.device != like.device:
        raise DtypeError(f"{name}: expected the device of {like_name}, {like.device}, got {tensor.device}.")


def check_precision(precision: str | None) -> None:
    """Raise ConfigError unless `precision` is one, or None."""
    if precision is not None and precision not in get_args(Precision):
        raise ConfigError(f"precision: expected one of {', '.join(get_args(Precision))}, got {precision!r}.")


def check_k(k: int, d_sae: int, name: str = "k") -> None:
    """Raise ConfigError unless 1 <= k <= d_sae."""
    if isinstance(k, bool) or not isinstance(k, int):
        raise DtypeError(f"{name}: expected an int, got {type(k).__name__}.")
    if not 1 <= k <= d_sae:
        raise ConfigError(f"{name}: expected 1 <= {name} <= {d_sae}, the number of latents to choose from, got {k}.")


def check_indices(name: str, indices: Tensor, size: int) -> None:
    """Raise DtypeError or ShapeError unless every index lies in [0, size).

    The range is looked at on the CPU only: on a GPU that would make the host wait for the device.
    """
    if indices.dtype not in (torch.int32, torch.int64):
        raise DtypeError(f"{name}: expected int32 or int64, got {indices.dtype}.")
    is_traced = torch.compiler.is_compiling() or type(indices) is not Tensor  # then there are no values
    if indices.device.type == "cpu" and not is_traced and indices.numel():
        low, high = (int(bound) for bound in torch.aminmax(indices))
        if low < 0 or high >= size:
            raise ShapeError(f"{name}: expected every index in [0, {size}), got values from {low} to {high}.")


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype to accumulate in: float32 for everything narrower."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def rows_contiguous(tensor: Tensor) -> Tensor:
    """Return a matrix whose rows are contiguous: the tensor itself, or a copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
