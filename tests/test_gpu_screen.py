"""The 8-bit screen on a CUDA device: `pytest -m gpu`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from flashsae.ops.encode.keys import Keys
from flashsae.ops.encode.layout import Layout
from flashsae.ops.encode.onesided import OneSided
from flashsae.testing import poison_empty
from helpers.screens import Screen, exact_pre_acts
from helpers.selection import selection_mistakes

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
B, D, N, K = 300, 512, 32768, 48
LOOSE = slice(9, None, 50)


def operands(dtype: torch.dtype, magnitude: bool) -> tuple[Tensor, Tensor, Keys, Screen]:
    """Return x, W, keys and a screen that leaves too much of some tokens open; one is zeros."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    x = torch.randn(B, D, device=DEVICE, generator=generator).to(dtype)
    W = (torch.randn(N, D, device=DEVICE, generator=generator) / D**0.5).to(dtype)
    x[7] = 0.0
    keys = Keys(0.1 * torch.randn(N, device=DEVICE, generator=generator), None, magnitude)
    width = 0.1 + 0.1 * torch.rand(N, device=DEVICE, generator=generator)
    screen = Screen.of(x, keys.of(exact_pre_acts(x, W, keys)), width, generator)
    screen.screened.of_tokens[0, LOOSE] *= 30.0
    return x, W, keys, screen


def selected(x: Tensor, W: Tensor, keys: Keys, screen: Screen, rows: int = 128) -> tuple[Tensor, Tensor, Tensor]:
    out = torch.empty(B, K, device=DEVICE), torch.empty(B, K, device=DEVICE, dtype=torch.int64)
    counts = torch.empty(B, device=DEVICE, dtype=torch.int32)
    selection = OneSided(x, W, keys, Layout.of(N, K), out, counts)
    for start in range(0, B, rows):
        selection.add(screen.part(start, min(B, start + rows), DEVICE))
    selection.finish()
    return *out, counts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("magnitude", [False, True])
def test_t2_what_a_screen_leaves_open_is_selected_from(magnitude: bool, dtype: torch.dtype) -> None:
    x, W, keys, screen = operands(dtype, magnitude)
    with poison_empty():
        acts, indices, counts = selected(x, W, keys, screen)
    assert bool((indices.diff() > 0).all())
    assert selection_mistakes(x, W, keys.b_enc, indices, magnitude=magnitude)[0] == 0
    torch.testing.assert_close(acts, exact_pre_acts(x, W, keys).gather(1, indices).float(), rtol=1e-5, atol=1e-5)
    redone = counts == N
    assert bool(redone[LOOSE].all())
    assert int(redone.sum()) == len(counts[LOOSE])
    assert bool((counts[~redone] <= Layout.of(N, K).capacity).all())


def test_t3_in_a_cuda_graph_the_same_bits() -> None:
    x, W, keys, screen = operands(torch.bfloat16, False)
    first = selected(x, W, keys, screen)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        again = selected(x, W, keys, screen)
    for tensor in again:
        tensor.zero_()
    for _ in range(2):
        graph.replay()
        for a, b in zip(first, again):
            assert torch.equal(a, b)
