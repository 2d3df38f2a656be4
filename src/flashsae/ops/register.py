"""Operations as PyTorch operators, so that autograd, torch.compile and CUDA graphs know them.

`torch.library.custom_op` does the same and checks more, but its wrappers run on every call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])
_LIBRARY = torch.library.Library("flashsae", "DEF")  # type: ignore[no-untyped-call]


def operator(fake: Callable[..., Any]) -> Callable[[Function], Function]:
    """Make a function the operator torch.ops.flashsae.<its name without the underscore>.

    Args:
        fake: returns tensors of the right shapes and dtypes, without values. Takes the same arguments.
    Returns:
        a decorator. The function must not change its arguments, nor return one of them.
    """

    def register(function: Function) -> Function:
        name = function.__name__.removeprefix("_")
        schema = torch.library.infer_schema(function, mutates_args=())
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
        torch.library.register_fake(f"flashsae::{name}", fake, lib=_LIBRARY)
        return function

    return register


def differentiate(name: str, backward: Callable[..., Any], save: Callable[..., None]) -> None:
    """Give an operator its backward pass, and the function that saves what that needs."""
    torch.library.register_autograd(f"flashsae::{name}", backward, setup_context=save, lib=_LIBRARY)
