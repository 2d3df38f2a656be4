"""What "exact" means, as checks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor


def assert_as_accurate(ours: Tensor, theirs: Tensor, exact: Tensor, name: str = "result") -> None:
    """Assert that `ours` is about as close to the truth as PyTorch is (tier T1).

        max|ours - exact| <= 2 * max|theirs - exact| + 2 ulp of max|exact|

    Args:
        ours: what is tested, any shape.
        theirs: PyTorch's dense result in the same dtype.
        exact: the same in float64.
        name: for the message.
    Raises:
        AssertionError: gives both errors and the bound.
    """
    assert ours.shape == exact.shape, f"{name}: shape {list(ours.shape)}, expected {list(exact.shape)}"
    assert ours.dtype == theirs.dtype, f"{name}: dtype {ours.dtype}, expected {theirs.dtype}"
    if exact.numel() == 0:
        return
    error = (ours.double() - exact).abs().max().item()
    peer_error = (theirs.double() - exact).abs().max().item()
    ulp = torch.finfo(ours.dtype).eps * exact.abs().max().item()
    bound = 2 * peer_error + 2 * ulp
    # written so that NaN fails
    assert error <= bound, f"{name}: error {error:.3g}, PyTorch's {peer_error:.3g}, bound {bound:.3g}"


def integer_inputs(
    *shape: int, generator: torch.Generator, largest: int = 4, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return small random integers as floats, so that every sum of products is exact in any order (tier T0)."""
    values = torch.randint(
        -largest, largest + 1, shape, generator=generator, dtype=torch.int64, device=generator.device
    )
    return values.to(dtype)


@contextmanager
def poison_empty() -> Iterator[None]:
    """Fill what `torch.empty` and its kin return with NaN (integers: the lowest), so that unwritten memory shows.

    Reaches inside operators of `torch.ops` and backward threads, where a TorchFunctionMode does not.
    """
    with (
        patch.object(torch, "empty", _poisoned(torch.empty)),
        patch.object(torch, "empty_like", _poisoned(torch.empty_like)),
        patch.object(torch, "empty_strided", _poisoned(torch.empty_strided)),
        patch.object(torch.Tensor, "new_empty", _poisoned(torch.Tensor.new_empty)),
    ):
        yield


def _poisoned(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        result = function(*args, **kwargs)
        if result.is_floating_point():
            result.detach().fill_(torch.nan)
        elif result.dtype != torch.bool:
            result.fill_(torch.iinfo(result.dtype).min)
        return result

    return poisoned
