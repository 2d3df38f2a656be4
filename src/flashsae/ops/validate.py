"""Checks of arguments that the operations share, made before anything is computed."""

from __future__ import annotations

import operator
from typing import Any, get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad

from flashsae.errors import ConfigError, DtypeError, GradientError, ShapeError
from flashsae.precision import Precision as Precision

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

_ORDINARY = (Tensor, torch.nn.Parameter)


def check_shape(name: str, tensor: Tensor, expected: tuple[int | str, ...]) -> None:
    """Raise unless `tensor` is an ordinary tensor of this shape; a string in it names a size that is free.

    Raises:
        ShapeError: it has another shape.
        DtypeError, GradientError: from `check_ordinary`.
    """
    check_ordinary(name, tensor)
    fits = len(expected) == tensor.dim() and all(
        isinstance(want, str) or want == size for want, size in zip(expected, tensor.shape)
    )
    if not fits:
        wanted = ", ".join(str(size) for size in expected)
        raise ShapeError(f"{name}: expected the shape [{wanted}], got {list(tensor.shape)}.")


def check_ordinary(name: str, tensor: Tensor) -> None:
    """Raise unless operations and kernels may read this as a tensor of numbers in memory, outside of transforms.

    Raises:
        DtypeError: no tensor, or a sparse, nested or distributed one.
        GradientError: it belongs to forward-mode differentiation or to a transform of torch.func, of which operators
            would know nothing: the tangent would be 0.
    """
    if type(tensor) in _ORDINARY and tensor.layout is torch.strided and not tensor.is_nested and not _is_transforming():
        return
    if not isinstance(tensor, Tensor):
        raise DtypeError(f"{name}: expected a tensor, got {type(tensor).__name__}.")
    if type(tensor).__name__ == "DTensor":  # not imported for this check
        raise DtypeError(
            f"{name}: got a DTensor, as fully_shard makes them, which is not supported: leave the SAE out of "
            "fully_shard and train it on one device."
        )
    if tensor.is_nested:
        raise DtypeError(f"{name}: expected a dense tensor, got a nested one. Join it: torch.cat({name}.unbind()).")
    if tensor.layout is not torch.strided:
        raise DtypeError(f"{name}: expected a dense tensor, got {tensor.layout}. Convert it: {name}.to_dense().")
    if _is_transforming():
        _refuse_transforms(name, tensor)


def _is_transforming() -> bool:
    """Tell whether forward-mode differentiation or a transform of torch.func is going on."""
    return not torch.compiler.is_compiling() and (
        forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()
    )


def _refuse_transforms(name: str, tensor: Tensor) -> None:
    if forward_ad.unpack_dual(tensor).tangent is not None:  # type: ignore[no-untyped-call]
        raise GradientError(
            f"{name}: forward-mode differentiation (torch.func.jvp, jacfwd, dual tensors) is not supported: use "
            "backward passes, as torch.autograd.grad does."
        )
    if torch._C._are_functorch_transforms_active() and (
        torch._C._functorch.is_functorch_wrapped_tensor(tensor) or (tensor.requires_grad and torch.is_grad_enabled())
    ):
        raise GradientError(
            f"{name}: transforms of torch.func (grad, vjp, jacrev, vmap, ...) are not supported: use "
            "torch.autograd.grad, and more rows in place of vmap."
        )


def check_float(
    name: str, tensor: Tensor, like: Tensor | None = None, like_name: str = "", *, or_dtype: torch.dtype | None = None
) -> None:
    """Raise DtypeError unless `tensor` is float and, where given, of the dtype (or `or_dtype`) and device of `like`."""
    if tensor.dtype not in FLOATS:
        way = "dequantize" if tensor.is_quantized else "float"
        raise DtypeError(f"{name}: expected a float tensor, got {tensor.dtype}. Convert it: {name}.{way}().")
    if like is not None and tensor.dtype not in (like.dtype, or_dtype):
        raise DtypeError(
            f"{name}: expected {like.dtype}, the dtype of {like_name}, got {tensor.dtype}. "
            f"Convert it: {name}.to({like_name}.dtype)."
        )
    if like is not None:
        check_device(name, tensor, like, like_name)


def check_device(name: str, tensor: Tensor, like: Tensor, like_name: str) -> None:
    """Raise DtypeError unless `tensor` is where `like` is."""
    if tensor.device != like.device:
        raise DtypeError(
            f"{name}: expected the device of {like_name}, {like.device}, got {tensor.device}. "
            f"Move it: {name}.to({like_name}.device)."
        )


def check_constant(name: str, tensor: Tensor) -> None:
    """Raise GradientError if somebody waits for a gradient that `tensor` will not get."""
    if tensor.requires_grad and torch.is_grad_enabled():
        raise GradientError(f"{name}: it receives no gradient here, but requires one. Pass {name}.detach().")


def check_precision(precision: str | None) -> None:
    """Raise ConfigError unless `precision` is one, or None."""
    if precision is not None and precision not in get_args(Precision):
        raise ConfigError(f"precision: expected one of {', '.join(get_args(Precision))}, got {precision!r}.")


def check_noise(noise: Tensor | None, x: Tensor) -> None:
    """Raise unless the seed of rounding noise is None or one int64 number where x is."""
    if noise is not None:
        check_shape("noise", noise, ())
        if noise.dtype != torch.int64:
            raise DtypeError(f"noise: expected an int64 tensor, got {noise.dtype}. Convert it: noise.long().")
        check_device("noise", noise, x, "x")


def as_int(name: str, value: Any) -> int:
    """Return an integer of any kind (NumPy's too) as an int; raise DtypeError for anything else, bool included."""
    if not isinstance(value, bool | Tensor):
        try:
            return int(operator.index(value))
        except TypeError:
            pass
    raise DtypeError(f"{name}: expected an int, got {type(value).__name__}.")


def check_k(k: Any, d_sae: int, name: str = "k") -> int:
    """Return k as an int; raise DtypeError unless it is one, ConfigError unless 1 <= k <= d_sae."""
    count = as_int(name, k)
    if not 1 <= count <= d_sae:
        raise ConfigError(
            f"{name}: expected 1 <= {name} <= {d_sae}, the number of latents to choose from, got {count}."
        )
    return count


def check_indices(name: str, indices: Tensor, size: int, *, lowest: int = 0) -> None:
    """Raise DtypeError or ShapeError unless every index lies in [lowest, size).

    The range is checked on the CPU only: on a GPU that would make the host wait for the device.
    """
    if indices.dtype not in (torch.int32, torch.int64):
        raise DtypeError(f"{name}: expected int32 or int64, got {indices.dtype}.")
    if indices.device.type == "cpu" and has_values(indices) and indices.numel():
        low, high = (int(bound) for bound in torch.aminmax(indices))
        if low < lowest or high >= size:
            raise ShapeError(f"{name}: expected every index in [{lowest}, {size}), got values from {low} to {high}.")


def has_values(tensor: Tensor) -> bool:
    """Tell whether there are numbers in memory to be looked at: not while tracing, where tensors are stand-ins."""
    return (
        not torch.compiler.is_compiling()
        and type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__
        and torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is None  # of make_fx
    )


def compute_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """Return the dtype to accumulate in: float64 if any of them is that, else float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def packed(*tensors: Tensor | None) -> Any:
    """Return tensors (or None) as kernels read them: one number behind the other. Copies only what lies otherwise.

    A single one comes alone, several as a tuple.
    """
    result = tuple(None if tensor is None else _resolved(tensor).contiguous() for tensor in tensors)
    return result if len(result) > 1 else result[0]


def rows_contiguous(tensor: Tensor) -> Tensor:
    """Return a matrix whose rows are contiguous: the tensor itself, or a copy."""
    tensor = _resolved(tensor)
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _resolved(tensor: Tensor) -> Tensor:
    """Return a tensor whose memory holds its numbers, not their negatives."""
    return tensor.resolve_neg() if tensor.is_neg() else tensor
