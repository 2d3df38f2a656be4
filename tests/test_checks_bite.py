"""Proof that the checkers can fail: operations with the bugs that such code has, and the tier that catches each."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dense import dense_encode, dense_topk
from flashsae.ops import build_index, decode_sparse, encode_topk, latent_rows
from flashsae.testing import assert_as_accurate, integer_inputs, poison_empty


def _code(generator: torch.Generator, B: int = 33, k: int = 4, d_sae: int = 20, d_in: int = 9) -> tuple[Tensor, ...]:
    top_indices = torch.rand(B, d_sae, generator=generator).topk(k, dim=1).indices
    top_acts = torch.rand(B, k, generator=generator) + 0.1
    return top_acts, top_indices, torch.randn(d_sae, d_in, generator=generator)


def test_t1_passes_the_real_decode_and_catches_a_sum_in_bfloat16(generator: torch.Generator) -> None:
    top_acts, top_indices, W_dec = _code(generator)
    gathered = W_dec[top_indices]
    exact = (gathered.double() * top_acts.double()[..., None]).sum(1)
    theirs = (gathered * top_acts[..., None]).sum(1)
    assert_as_accurate(decode_sparse(top_acts, top_indices, W_dec), theirs, exact)
    low = (gathered.bfloat16() * top_acts.bfloat16()[..., None]).sum(1).float()
    with pytest.raises(AssertionError, match=r"x_hat: error .*, PyTorch's .*, bound"):
        assert_as_accurate(low, theirs, exact, "x_hat")


@pytest.mark.parametrize("bug", ["dropped tail", "two indices swapped", "a NaN", "another shape", "another dtype"])
def test_t1_catches(bug: str, generator: torch.Generator) -> None:
    exact = torch.randn(37, 5, generator=generator, dtype=torch.float64)
    theirs = exact.float()
    ours = theirs.clone()
    if bug == "dropped tail":
        ours[36:] = 0
    elif bug == "two indices swapped":
        ours[[3, 4]] = ours[[4, 3]]
    elif bug == "a NaN":
        ours[0, 0] = torch.nan
    ours = {"another shape": ours[:36], "another dtype": ours.double()}.get(bug, ours)
    with pytest.raises(AssertionError):
        assert_as_accurate(ours, theirs, exact)


def test_t0_catches_a_missing_relu_mask(generator: torch.Generator) -> None:
    x, weights, bias = (integer_inputs(*s, generator=generator) for s in ((8, 3), (10, 3), (10,)))
    weights.requires_grad_()
    top_acts, top_indices = encode_topk(x, weights, bias, 8)
    upstream = integer_inputs(8, 8, generator=generator)
    dense = dense_encode(x, weights, bias, top_indices, None).gather(1, top_indices)
    (expected,) = torch.autograd.grad(dense, weights, upstream)
    assert bool((top_acts == 0).any())  # else the mask would not matter
    unmasked = latent_rows(build_index(top_indices, 10), upstream, x)
    masked = latent_rows(build_index(top_indices, 10), upstream * (top_acts.detach() > 0), x)
    assert torch.equal(masked, expected)
    assert not torch.equal(unmasked, expected)


def test_t0_catches_a_tie_broken_the_other_way(generator: torch.Generator) -> None:
    pre_acts = integer_inputs(20, 30, generator=generator)
    highest_first = 29 - dense_topk(pre_acts.flip(1), 7).flip(1)
    assert bool((pre_acts.gather(1, highest_first) >= pre_acts.topk(7).values[:, -1:]).all())  # a valid top-k
    assert not torch.equal(highest_first, dense_topk(pre_acts, 7))


def test_poison_shows_memory_that_was_never_written() -> None:
    def forgets_the_last_row(n: int) -> Tensor:
        out = torch.empty(n, 2)
        out[: n - 1] = 1.0
        return out

    with poison_empty():
        assert bool(forgets_the_last_row(3)[2].isnan().all())
        assert torch.empty_like(torch.zeros(2)).isnan().all()
        assert torch.zeros(3).new_empty(2).isnan().all()
        assert torch.empty(2, dtype=torch.int32).tolist() == [-(2**31)] * 2
        assert torch.zeros(2).tolist() == [0.0, 0.0]


def test_integer_inputs_make_sums_exact_in_any_order(generator: torch.Generator) -> None:
    a, b = integer_inputs(50, 300, generator=generator), integer_inputs(300, generator=generator)
    order = torch.randperm(300, generator=generator)
    assert torch.equal(a @ b, a[:, order] @ b[order])
    assert len(a.unique()) == 9


def test_shape_annotations_are_checked_in_tests() -> None:
    from flashsae.nn.losses import fvu_loss

    with pytest.raises(Exception, match="d_in"):
        fvu_loss(torch.zeros(3, 4), torch.zeros(3, 5))
