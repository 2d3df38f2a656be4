"""Norms of blocks of columns, whose gradient is a factor of float32 rows."""

from __future__ import annotations

import pytest
import torch

from flashsae.errors import ShapeError
from flashsae.ops import FactoredGradient, block_norms, collect_factors
from flashsae.testing import assert_as_accurate

WIDTHS = (5, 8, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_norms_and_their_gradient(dtype: torch.dtype, generator: torch.Generator) -> None:
    weights = torch.randn(20, 16, generator=generator).to(dtype)
    weights[3, :5] = 0.0
    grad = torch.randn(20, 3, generator=generator)
    found = []
    for kind in (dtype, torch.float32 if dtype == torch.bfloat16 else dtype, torch.float64):
        leaf = weights.to(kind, copy=True).requires_grad_()
        if not found:
            norms = block_norms(leaf, WIDTHS)
        else:
            norms = torch.stack([block.norm(dim=1) for block in leaf.split(WIDTHS, dim=1)], 1)  # type: ignore[no-untyped-call]
        norms.backward(grad.to(norms.dtype))
        assert leaf.grad is not None
        found.append((norms.detach(), leaf.grad))
    assert_as_accurate(found[0][0], found[1][0], found[2][0])
    assert_as_accurate(found[0][1], found[1][1].to(dtype), found[2][1])


def test_the_gradient_is_a_factor_where_it_is_asked_for(generator: torch.Generator) -> None:
    weights = torch.randn(20, 16, generator=generator).bfloat16().requires_grad_()
    with collect_factors(weights):
        block_norms(weights, WIDTHS).square().sum().backward()  # type: ignore[no-untyped-call]
    assert isinstance(weights.grad, FactoredGradient)
    dense = weights.grad.row_gradient().dense
    assert dense is not None
    torch.testing.assert_close(dense, 2 * weights.detach().float())


@pytest.mark.parametrize("widths", [(), (16, 0), (5, 8), (5, 8, 4)])
def test_blocks_that_do_not_fit_are_refused(widths: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match="widths: expected positive numbers that sum to d = 16"):
        block_norms(torch.ones(3, 16), widths)
