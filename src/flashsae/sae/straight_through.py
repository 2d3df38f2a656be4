"""Functions with a jump, whose gradient by the place of the jump is that of a smoothed one (straight-through)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def jump_relu(pre_acts: Tensor, threshold: Tensor, bandwidth: Tensor, *, ste_to_input: bool = False) -> Tensor:
    """Return pre-activations that exceed their threshold, and 0 for the others.

        JumpReLU(z) = z · H(z − threshold),   H(u) = 1 for u > 0, else 0

    Args:
        pre_acts: any shape, float. NaN counts as exceeding.
        threshold: of each, the same shape.
        bandwidth: of the kernel, a scalar above 0.
        ste_to_input: let the pre-activations have the estimate with the opposite sign, too: the jump moves either way.
    Gradients: pre_acts, H(z − threshold); threshold, estimated as −(threshold / bandwidth) · K, where the kernel K is 1
        in the window |z − threshold| < bandwidth / 2 and 0 outside. So a sparse code must hold what lies in the lower
        half of the window, too. Once differentiable.
    Source: Rajamanoharan et al. 2024, "Jumping ahead", sections 3 and 4.
    """
    found: Tensor = _Jump.apply(pre_acts, threshold, bandwidth, ste_to_input, True)  # type: ignore[no-untyped-call]
    return found


def exceeds(pre_acts: Tensor, threshold: Tensor, bandwidth: Tensor, *, ste_to_input: bool = False) -> Tensor:
    """Return 1 for pre-activations that exceed their threshold, and 0 for the others: H(z − threshold).

    Arguments as of `jump_relu`.

    Gradients: threshold, estimated as −K / bandwidth; pre_acts none, or with `ste_to_input` K / bandwidth.
    Source: Rajamanoharan et al. 2024, "Jumping ahead", section 4.
    """
    found: Tensor = _Jump.apply(pre_acts, threshold, bandwidth, ste_to_input, False)  # type: ignore[no-untyped-call]
    return found


def below_window(threshold: Tensor, bandwidth: Tensor) -> Tensor:
    """Return what pre-activations must exceed to have any gradient: threshold − bandwidth / 2."""
    return threshold - bandwidth / 2


class _Jump(torch.autograd.Function):
    """height · H(z − threshold), where the height is z or 1."""

    @staticmethod
    def forward(
        ctx: Any, pre_acts: Tensor, threshold: Tensor, bandwidth: Tensor, ste_to_input: bool, has_height: bool
    ) -> Tensor:
        threshold = threshold.to(pre_acts.dtype)
        ctx.save_for_backward(pre_acts, threshold, bandwidth)
        ctx.ste_to_input, ctx.has_height = ste_to_input, has_height
        is_below = pre_acts <= threshold
        return pre_acts.masked_fill(is_below, 0.0) if has_height else (~is_below).to(pre_acts.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        pre_acts, threshold, bandwidth = ctx.saved_tensors
        bandwidth = bandwidth.to(pre_acts.dtype)
        in_window = (pre_acts > below_window(threshold, bandwidth)) & (pre_acts < threshold + bandwidth / 2)
        moved = torch.where(in_window, grad, 0.0) / bandwidth
        if ctx.has_height:
            moved = moved * threshold
        through = grad.masked_fill(pre_acts <= threshold, 0.0) if ctx.has_height else torch.zeros_like(grad)
        return through + moved if ctx.ste_to_input else through, -moved, None, None, None
