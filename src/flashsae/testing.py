"""What "exact" means, as checks: used by the tests here, and by anyone who writes a backend."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


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
    values = torch.randint(-largest, largest + 1, shape, generator=generator)
    return values.to(dtype)


class poison_empty(TorchFunctionMode):  # noqa: N801  # reads as what it does: `with poison_empty():`
    """Fill what `torch.empty` and its kin return with NaN (integers: the lowest), so that unwritten memory shows."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run `func`, then poison its result if it is uninitialised memory."""
        result = func(*args, **(kwargs or {}))
        if func in (torch.empty, torch.empty_like, torch.Tensor.new_empty, torch.empty_strided):
            if result.is_floating_point():
                result.fill_(torch.nan)
            elif result.dtype != torch.bool:
                result.fill_(torch.iinfo(result.dtype).min)
        return result
