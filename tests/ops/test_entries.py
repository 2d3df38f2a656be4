"""Codes to which entries are added, and codes of positions that follow each other, against dense tensors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flashsae.errors import ConfigError, ShapeError
from flashsae.ops import Pattern, SparseCode, encode_above
from flashsae.ops.entries import check_same_tokens, firsts, joined, slots, widened
from helpers.kinds_of_codes import KINDS, code_of


@pytest.fixture
def dense(generator: torch.Generator) -> Tensor:
    values = torch.rand(2, 5, 16, generator=generator)
    return values * (values >= values.topk(3).values[..., -1:]) * torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0])[:, None]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("latents", [[3], [9, 0, 15], []])
def test_latents_are_found(kind: str, latents: list[int], dense: Tensor) -> None:
    code, wanted = code_of(kind, dense), torch.tensor(latents, dtype=torch.int64)
    slot = slots(code.pattern, wanted)
    there, is_first = firsts(code.pattern, slot, len(latents))
    assert is_first[slot < len(latents)].all()
    if kind == "varying":
        assert torch.equal(there, dense.flatten(0, 1)[:, latents] != 0)
    picked = torch.zeros(10, len(latents) + 1).index_put(
        (code.pattern.tokens.long().clamp_max(9), slot.flatten()), code.acts.flatten(), accumulate=True
    )
    assert torch.equal(picked[:, :-1], dense.flatten(0, 1)[:, latents])


def test_the_first_of_several_entries_of_a_latent() -> None:
    pattern = Pattern.topk(torch.tensor([[3, 5, 3, 0], [0, 1, 2, 4]]), 8)
    there, is_first = firsts(pattern, slots(pattern, torch.tensor([0, 3])), 2)
    assert there.tolist() == [[True, True], [True, False]]
    assert is_first.tolist() == [[True, True, False, True], [True, True, False, False]]


@pytest.mark.parametrize("kind", ["fixed", "varying"])
def test_entries_are_added_where_they_are_not(kind: str, dense: Tensor, generator: torch.Generator) -> None:
    code, latents = code_of(kind, dense), torch.tensor([9, 0, 15])
    missing = ~firsts(code.pattern, slots(code.pattern, latents), 3)[0]
    wanted = missing & (torch.rand(10, 3, generator=generator) > 0.3)
    wider = widened(code.pattern, latents, wanted)
    added = torch.rand(10, 3, generator=generator) * wanted
    acts = wider.acts(code.acts, added)
    more = torch.zeros(10, 16).index_copy(1, latents, added)
    assert torch.equal(SparseCode(wider.pattern, acts).to_dense(), dense.flatten(0, 1) + more)
    if kind == "varying":
        starts = wider.pattern.starts
        assert starts is not None
        Pattern.rows(wider.pattern.latents, starts, 16)  # each once, ascending


@pytest.mark.parametrize("kinds", [[kind] * 3 for kind in KINDS] + [["full", "varying", "fixed"]], ids="-".join)
def test_positions_follow_each_other(kinds: list[str], dense: Tensor) -> None:
    parts = [code_of(kind, part) for kind, part in zip(kinds, dense.split([2, 1, 2], dim=1))]
    values = [part.acts.clone().requires_grad_() for part in parts]
    code = joined([part.replace(acts) for part, acts in zip(parts, values)])
    assert code.shape == (2, 5)
    assert torch.equal(code.to_dense(), dense)
    code.to_dense().square().sum().backward()
    for part, acts in zip(parts, values):
        assert acts.grad is not None
        assert torch.equal(acts.grad, 2 * part.acts)


def test_codes_of_an_encoder_go_on(generator: torch.Generator) -> None:
    x, W = torch.randn(2, 5, 4, generator=generator), torch.randn(16, 4, generator=generator)

    def encoded(part: Tensor) -> SparseCode:
        code = encode_above(part.flatten(0, 1), W, torch.zeros(16), 1.0)
        return SparseCode(code.pattern, code.acts, tuple(part.shape[:2]))

    assert torch.equal(joined([encoded(x[:, :3]), encoded(x[:, 3:])]).to_dense(), encoded(x).to_dense())


def test_what_does_not_fit_is_refused(dense: Tensor) -> None:
    code = code_of("fixed", dense)
    with pytest.raises(ShapeError, match=r"one number of sequences, got \[2, 5\], \[1, 5\]"):
        joined([code, code_of("fixed", dense[:1])])
    with pytest.raises(ShapeError, match=r"one number of sequences, got \[10\]: read them one by one"):
        joined([SparseCode(code.pattern, code.acts)] * 2)
    with pytest.raises(ShapeError, match=r"edits: expected a code of the shape \[2, 5\], got \[1, 5\]"):
        check_same_tokens("edits", code_of("fixed", dense[:1]), code)
    with pytest.raises(ConfigError, match="expected a code of 16 latents, got one of 12"):
        check_same_tokens("edits", code_of("fixed", dense[..., :12]), code)
