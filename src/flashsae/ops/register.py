"""Operations as PyTorch operators, so that autograd, torch.compile and CUDA graphs know them.

`torch.library.custom_op` does the same and checks more, but its wrappers run on every call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C._dynamo import eval_frame

from flashsae.errors import GradientError

Function = TypeVar("Function", bound=Callable[..., Any])
_PRODUCTS = (("mkldnn", torch.backends.mkldnn.matmul), ("cuda", torch.backends.cuda.matmul))  # type: ignore[attr-defined]
_LIBRARY = torch.library.Library("flashsae", "DEF")  # type: ignore[no-untyped-call]


def operator(fake: Callable[..., Any]) -> Callable[[Function], Function]:
    """Make a function the operator torch.ops.flashsae.<its name without the underscore>, `isolated`.

    Args:
        fake: returns tensors of the right shapes and dtypes, without values. Takes the same arguments.
    Returns:
        a decorator. The function must not change its arguments, nor return one of them.
    """

    def register(function: Function) -> Function:
        name = function.__name__.removeprefix("_")
        schema = torch.library.infer_schema(function, mutates_args=())
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]
        _LIBRARY.impl(name, isolated(function), "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
        torch.library.register_fake(f"flashsae::{name}", fake, lib=_LIBRARY)
        return function

    return register


def differentiate(name: str, backward: Callable[..., Any], save: Callable[..., None]) -> None:
    """Give an operator its backward pass, and the function that saves what that needs.

    The backward pass is `isolated` too, and cannot be differentiated: where a graph of it is asked for
    (create_graph=True), going back through that graph raises GradientError.
    """
    alone = isolated(backward)

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        save(ctx, inputs, output)
        ctx.origins = [value for value in inputs if isinstance(value, Tensor) and value.requires_grad]

    def once(ctx: Any, *grads: Any) -> Any:
        upstream = [grad for grad in _leaves(grads) if isinstance(grad, Tensor)]
        if any(torch._C._functorch.is_legacy_batchedtensor(grad) for grad in upstream):
            raise GradientError(
                f"{name}: batches of gradients (is_grads_batched) are not supported: use one at a time."
            )
        if not torch.is_grad_enabled():
            return alone(ctx, *grads)
        with torch.no_grad():
            result = alone(ctx, *grads)
        found = [value for value in result if isinstance(value, Tensor)]
        # whoever asks for a gradient of these, by whatever the first ones depend on, comes by _Once
        marked = iter(_Once.apply(name, len(found), *found, *ctx.origins, *upstream))  # type: ignore[no-untyped-call]
        return tuple(next(marked) if isinstance(value, Tensor) else value for value in result)

    torch.library.register_autograd(f"flashsae::{name}", _untraced(once), setup_context=setup, lib=_LIBRARY)


def _leaves(grads: tuple[Any, ...]) -> Iterator[Any]:
    """Yield gradients of outputs, some of which are lists."""
    for grad in grads:
        if isinstance(grad, list | tuple):
            yield from grad
        else:
            yield grad


class _Once(torch.autograd.Function):
    """Gradients through which no other gradient goes."""

    @staticmethod
    def forward(ctx: Any, name: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.name = name
        return tuple(tensor.detach() for tensor in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *_grads: Tensor) -> None:
        raise GradientError(
            f"{ctx.name}: it can be differentiated once, not twice: for second derivatives write the dense formula in "
            "PyTorch, or take these gradients as constants with .detach()."
        )


def isolated(function: Function) -> Function:
    """Have a function compute the same, whatever a program's global settings are.

    Inside of it autocast is off, products of float32 numbers are not rounded to bf16 or TF32
    (`torch.set_float32_matmul_precision`), and the device of the first tensor is the current one, where kernels run.
    Where this is so already, as a rule, it costs about a microsecond.
    """

    @functools.wraps(function)
    def alone(*args: Any, **settings: Any) -> Any:
        guards = _guards(args)
        if not guards:
            return function(*args, **settings)
        with ExitStack() as stack:
            for guard in guards:
                stack.enter_context(guard)
            return function(*args, **settings)

    return _untraced(alone)  # type: ignore[return-value]


def _untraced(function: Function) -> Function:
    """Have torch.compile run a function as it is, and all that it calls, where it meets it outside of a graph.

    A graph ends at an operator whose results have sizes that depend on data: this is then called as ever, and what it
    does would be traced. `torch.compiler.disable` says the same, and imports the compiler.
    """
    skip = eval_frame._FrameAction.SKIP
    eval_frame.set_code_exec_strategy(function.__code__, eval_frame._FrameExecStrategy(skip, skip))
    return function


def _guards(args: tuple[Any, ...]) -> list[AbstractContextManager[Any]]:
    """Return what must be entered before a function of these arguments may run; as a rule nothing."""
    guards: list[AbstractContextManager[Any]] = []
    if torch._C._is_any_autocast_enabled():
        guards.append(torch._C._DisableAutocast())
    for name, matmul in _PRODUCTS:
        # what matmul.fp32_precision reads, at a tenth of its time
        if torch._C._get_fp32_precision_getter(name, "matmul") not in ("none", "ieee"):
            guards.append(_float32_products(matmul))
    first = next((arg for arg in args if isinstance(arg, Tensor)), None)
    if first is not None and first.is_cuda and first.device.index != torch.cuda.current_device():
        guards.append(torch.cuda.device(first.device))
    return guards


@contextmanager
def _float32_products(matmul: Any) -> Iterator[None]:
    before = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = "none"  # what a wider setting says
        if matmul.fp32_precision != before:
            matmul.fp32_precision = before
