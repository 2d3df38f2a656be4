"""The 8-bit screen on a CUDA device: `pytest -m gpu`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from flashsae.ops.encode.keys import Keys
from flashsae.ops.encode.layout import Layout
from flashsae.ops.encode.onesided import most_extras, select_onesided
from flashsae.testing import poison_empty
from helpers.bounds import Bounds, exact_pre_acts
from helpers.selection import selection_mistakes

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
B, D, N, K = 300, 512, 32768, 48


def operands(dtype: torch.dtype, magnitude: bool) -> tuple[Tensor, Tensor, Keys, Bounds]:
    """Return x, W, keys and bounds of which some rows leave too much open, and one that is zeros."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    x = torch.randn(B, D, device=DEVICE, generator=generator).to(dtype)
    W = (torch.randn(N, D, device=DEVICE, generator=generator) / D**0.5).to(dtype)
    x[7] = 0.0
    keys = Keys(0.1 * torch.randn(N, device=DEVICE, generator=generator), None, magnitude)
    exact = keys.of(exact_pre_acts(x, W, keys))
    slack = torch.rand(exact.shape, device=DEVICE, generator=generator) * 0.5 + 1e-5
    slack[7] = 0.0
    slack[9::50] += torch.rand(exact[9::50].shape, device=DEVICE, generator=generator) * 8.0
    return x, W, keys, Bounds.of(exact, slack)


def selected(x: Tensor, W: Tensor, keys: Keys, bounds: Bounds) -> tuple[Tensor, Tensor, Tensor]:
    out = torch.empty(B, K, device=DEVICE), torch.empty(B, K, device=DEVICE, dtype=torch.int64)
    return *out, select_onesided(x, W, keys, Layout.of(N, K), bounds.upper, bounds.maxima.clone(), out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("magnitude", [False, True])
def test_t2_what_upper_bounds_leave_over_is_selected_from(magnitude: bool, dtype: torch.dtype) -> None:
    x, W, keys, bounds = operands(dtype, magnitude)
    with poison_empty():
        acts, indices, counts = selected(x, W, keys, bounds)
    assert bool((indices.diff() > 0).all())
    assert selection_mistakes(x, W, keys.b_enc, indices, magnitude=magnitude)[0] == 0
    torch.testing.assert_close(acts, exact_pre_acts(x, W, keys).gather(1, indices).float(), rtol=1e-5, atol=1e-5)
    assert bool((counts[9::50] == N).all())
    redone = counts == N
    assert int(redone.sum()) == 6
    assert bool((counts[~redone] <= K + most_extras(K)).all())


def test_t3_in_a_cuda_graph_the_same_bits() -> None:
    x, W, keys, bounds = operands(torch.bfloat16, False)
    first = selected(x, W, keys, bounds)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        again = selected(x, W, keys, bounds)
    for tensor in again:
        tensor.zero_()
    for _ in range(2):
        graph.replay()
        for a, b in zip(first, again):
            assert torch.equal(a, b)
