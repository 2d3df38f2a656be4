"""A forward calls attention as another one did: without a mask where that needed none."""

from __future__ import annotations

from threading import Thread
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from flashsae.lm.attention import AttentionCalls

NONE_SEEN = torch.zeros(1, 1, 8, 8, dtype=torch.bool)


@pytest.fixture
def q() -> Tensor:
    return torch.randn(2, 3, 8, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("is_causal", [False, True])
def test_a_call_that_had_no_mask_has_none_again(q: Tensor, is_causal: bool) -> None:
    calls = AttentionCalls()
    with calls.noted():
        expected = scaled_dot_product_attention(q, q, q, is_causal=is_causal, scale=0.3)
    with calls.again():
        found = [
            scaled_dot_product_attention(q, q, q, NONE_SEEN.expand(2, 1, 8, 8), scale=0.3),
            scaled_dot_product_attention(q, q, q, attn_mask=NONE_SEEN, scale=0.3),  # a call that was not there before
        ]
    assert torch.equal(found[0], expected)
    assert not torch.equal(found[1], expected)


def test_a_call_that_had_a_mask_keeps_its_own(q: Tensor) -> None:
    calls, mask = AttentionCalls(), torch.ones(8, 8, dtype=torch.bool).tril(-1)
    mask[0, 0] = True
    with calls.noted():
        noted = [scaled_dot_product_attention(q, q, q, mask), scaled_dot_product_attention(q, q, q)]
    with calls.again():
        again = [scaled_dot_product_attention(q, q, q, mask.T), scaled_dot_product_attention(q, q, q, mask)]
    assert torch.equal(again[0], scaled_dot_product_attention(q, q, q, mask.T))
    assert torch.equal(again[1], noted[1])
    with calls.again():
        assert torch.equal(scaled_dot_product_attention(q, q, q, mask), noted[0])


def test_calls_of_other_threads_and_behind_the_end_are_left_alone(q: Tensor) -> None:
    calls, found = AttentionCalls(), []
    expected = scaled_dot_product_attention(q, q, q, NONE_SEEN)

    def call() -> None:
        found.append(scaled_dot_product_attention(q, q, q, NONE_SEEN))

    with calls.noted():
        scaled_dot_product_attention(q, q, q)
    with calls.again():
        thread = Thread(target=call)
        thread.start()
        thread.join()
    call()
    assert all(torch.equal(each, expected) for each in found)


class Masking(nn.Module):
    """Gives a mask always, as models do that cannot look whether anything is masked."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, ids: Tensor, attention_mask: Tensor) -> Any:
        n, length = ids.shape
        mask = attention_mask.bool()[:, None, None].expand(n, 1, length, length)
        return self.inner(input_ids=ids, attention_mask=mask & torch.ones(length, length, dtype=torch.bool).tril())


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_models_are_given_the_attention_that_they_chose(tiny: ModuleType, family: str) -> None:
    model = {"gpt2": tiny.gpt2().base_model, "llama": tiny.llama()}[family].eval()
    ids, calls = torch.arange(12).view(2, 6), AttentionCalls()
    with torch.no_grad():
        with calls.noted():
            expected = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        with calls.again():
            found = Masking(model)(ids, torch.ones_like(ids)).last_hidden_state
        other = Masking(model)(ids, torch.zeros_like(ids)).last_hidden_state
        with calls.again():
            same = Masking(model)(ids, torch.zeros_like(ids)).last_hidden_state
    assert torch.equal(found, expected)
    assert torch.equal(same, expected)
    assert not torch.equal(other, expected)
