from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flashsae.errors import ConfigError, DtypeError
from flashsae.ops import LatentIndex, SparseCode, by_value, decode, decode_loss, encode_topk
from flashsae.testing import integer_inputs
from helpers.codes import ragged


def _by_loops(acts: Tensor, latents: Tensor, magnitude: bool) -> list[list[tuple[int, float]]]:
    def place(pair: tuple[int, float]) -> tuple[bool, float, int]:
        latent, value = pair
        return value == value, -(abs(value) if magnitude else value), latent

    return [sorted(zip(*row), key=place) for row in zip(latents.tolist(), acts.tolist())]


@pytest.mark.parametrize("magnitude", [False, True])
@pytest.mark.parametrize(("B", "k"), [(0, 3), (1, 1), (37, 7), (5, 200)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_t0_the_order_is_that_of_a_plain_sort(
    B: int, k: int, dtype: torch.dtype, magnitude: bool, generator: torch.Generator
) -> None:
    acts = integer_inputs(B, k, generator=generator, dtype=dtype)
    acts[acts == 2] = -0.0
    latents = torch.rand(B, 300, generator=generator).argsort(1)[:, :k]  # in no order
    code = by_value(SparseCode.topk(acts, latents, 300), magnitude=magnitude)
    pairs = [list(zip(*row)) for row in zip(code.top_indices.tolist(), code.top_acts.tolist())]
    assert pairs == _by_loops(acts, latents, magnitude)
    assert code.acts.dtype == dtype


def test_not_a_number_comes_first_and_infinity_next() -> None:
    acts = torch.tensor([[1.0, torch.nan, -torch.inf, torch.inf, -torch.nan]])
    code = SparseCode.topk(acts, torch.tensor([[4, 3, 0, 1, 2]]), 5)
    assert by_value(code).top_indices.tolist() == [[2, 3, 1, 4, 0]]
    assert by_value(code, magnitude=True).top_indices.tolist() == [[2, 3, 0, 1, 4]]


@pytest.mark.parametrize("magnitude", [False, True])
def test_t0_gradients_go_where_values_came_from(magnitude: bool, generator: torch.Generator) -> None:
    acts = torch.randn(9, 6, generator=generator).requires_grad_()
    latents = torch.arange(6).expand(9, 6)
    code = SparseCode.topk(acts, latents, 6)
    upstream = torch.randn(9, 6, generator=generator)
    moved = by_value(code, magnitude=magnitude)
    (grad,) = torch.autograd.grad(moved.acts, acts, upstream)
    assert torch.equal(grad.gather(1, moved.top_indices), upstream)
    assert torch.equal(moved.to_dense(), code.to_dense())


def test_the_first_j_entries_are_those_that_j_selects(generator: torch.Generator) -> None:
    x, W = (integer_inputs(*shape, generator=generator) for shape in ((23, 6), (40, 6)))
    code = by_value(encode_topk(x, W, torch.zeros(40), 12))
    for j in (1, 5, 12):
        fewer = encode_topk(x, W, torch.zeros(40), j)
        assert torch.equal(code.top_indices[:, :j].sort(dim=1).values, fewer.top_indices)
        assert torch.equal(by_value(fewer).acts, code.acts[:, :j])


def test_pre_activations_go_along(generator: torch.Generator) -> None:
    x, W = (integer_inputs(*shape, generator=generator) for shape in ((23, 6), (40, 6)))
    code = encode_topk(x, W, torch.zeros(40), 12)
    moved = by_value(code.replace(-code.acts))
    assert moved.pre_acts is not None
    assert torch.equal(moved.pre_acts, -moved.acts)


def test_leading_dimensions_stay(generator: torch.Generator) -> None:
    code = SparseCode.topk(torch.randn(2, 3, 4, generator=generator), torch.arange(4).expand(2, 3, 4), 4)
    assert by_value(code).top_acts.shape == (2, 3, 4)


def test_both_orders_share_a_sort_and_give_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    built, of_entries = [], LatentIndex.of_entries

    def count(*args: Any, **settings: Any) -> LatentIndex:
        built.append(of_entries(*args, **settings))
        return built[-1]

    monkeypatch.setattr(LatentIndex, "of_entries", count)
    x, weights = integer_inputs(23, 6, generator=generator), integer_inputs(2, 40, 6, generator=generator)
    found = []
    for is_ordered in (False, True):
        W_enc_T, W_dec = (W.clone().requires_grad_() for W in weights)
        code = encode_topk(x, W_enc_T, torch.zeros(40), 5)
        code = by_value(code) if is_ordered else code
        built.clear()
        loss = decode_loss(code, W_dec, None, x).loss
        found.append(torch.autograd.grad(loss, [W_dec, W_enc_T]))
        assert len(built) == 1
        index = code.pattern.index
        assert torch.equal(index.by_entry, code.pattern.latents.flatten())
        assert torch.equal(index.offsets, built[0].offsets)
        assert bool((index.entry_tokens.diff()[index.latents.diff() == 0] > 0).all())
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("which", ["first", "second"])
def test_an_index_is_not_shared_after_somebody_wrote_to_the_latents(which: str) -> None:
    code = SparseCode.topk(torch.tensor([[1.0, 2.0]]), torch.tensor([[0, 3]]), 5)
    moved = by_value(code)
    (code if which == "first" else moved).pattern.latents[0, 0] = 4
    for each in (code, moved):
        assert torch.equal(each.pattern.index.by_entry, each.pattern.latents.flatten())


def test_latents_may_be_written_to_in_inference_mode() -> None:
    with torch.inference_mode():
        moved = by_value(SparseCode.topk(torch.tensor([[1.0, 2.0]]), torch.tensor([[0, 3]]), 5))
        assert moved.top_indices.tolist() == [[3, 0]]
        assert moved.pattern.index.by_entry.tolist() == [3, 0]
        assert decode(moved, torch.eye(5)).tolist() == [[1.0, 0.0, 0.0, 2.0, 0.0]]


def test_other_codes_are_refused(generator: torch.Generator) -> None:
    pattern = ragged([1, 2], 5, generator)
    with pytest.raises(ConfigError, match="code: expected the same number of latents for every token"):
        by_value(SparseCode(pattern, torch.ones(3)))
    with pytest.raises(DtypeError, match="code: expected a SparseCode"):
        by_value(torch.ones(3))  # type: ignore[arg-type]


def test_t0_a_key_scale_orders_as_it_selects(device: str, generator: torch.Generator) -> None:
    x, W = (integer_inputs(*shape, generator=generator).to(device) for shape in ((9, 6), (40, 6)))
    scale = 2.0 ** torch.randint(-2, 3, (40,), generator=generator).to(device)
    scale[3] = 0.0
    b_enc = torch.zeros(40, device=device)
    code = by_value(encode_topk(x, W, b_enc, 12, key_scale=scale), key_scale=scale)
    for j in (1, 5, 12):
        fewer = encode_topk(x, W, b_enc, j, key_scale=scale)
        assert torch.equal(code.top_indices[:, :j].sort(dim=1).values, fewer.top_indices)
