from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from flashsae.errors import ConfigError, DtypeError, ShapeError
from flashsae.ops import Pattern, SparseCode, decode, decode_loss, latent_rows
from helpers.codes import dense_of, index_of, ragged


@pytest.mark.parametrize(("B", "k", "d_sae"), [(0, 3, 4), (1, 1, 1), (37, 5, 11), (8, 4, 1000)])
def test_lists_are_those_of_a_plain_loop(B: int, k: int, d_sae: int, generator: torch.Generator) -> None:
    top_indices = torch.randint(0, d_sae, (B, k), generator=generator)
    index = index_of(top_indices, d_sae)
    expected: list[list[int]] = [[] for _ in range(d_sae)]
    for entry, latent in enumerate(top_indices.flatten().tolist()):
        expected[latent].append(entry)
    bounds = index.offsets.tolist()
    assert [index.entries[a:b].tolist() for a, b in itertools.pairwise(bounds)] == expected
    assert index.entry_tokens.tolist() == [entry // k for entries in expected for entry in entries]
    assert index.d_sae == d_sae


@pytest.mark.parametrize("counts", [[], [0], [0, 0, 0], [3, 0, 7, 1], [11] * 4])
@pytest.mark.parametrize("spare", [0, 5])
@pytest.mark.parametrize("d_sae", [11, 40_000])
def test_lists_of_varying_length_are_those_of_a_plain_loop(
    counts: list[int], spare: int, d_sae: int, generator: torch.Generator
) -> None:
    pattern = ragged(counts, d_sae, generator, spare=spare)
    owners = [token for token, count in enumerate(counts) for _ in range(count)]
    assert (pattern.B, pattern.k, pattern.capacity) == (len(counts), None, sum(counts) + spare)
    assert pattern.counts.tolist() == counts
    assert pattern.tokens.tolist() == owners + [len(counts)] * spare
    expected: dict[int, list[int]] = {}
    for entry, latent in enumerate(pattern.latents[: sum(counts)].tolist()):
        expected.setdefault(latent, []).append(entry)
    index = pattern.index
    assert int(index.offsets[-1]) == sum(counts)
    for latent, entries in expected.items():
        low, high = index.offsets[latent : latent + 2].tolist()
        assert index.entries[low:high].tolist() == entries
        assert index.entry_tokens[low:high].tolist() == [owners[entry] for entry in entries]
    assert int((index.counts > 0).sum()) == len(expected)


def test_an_index_out_of_range_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"top_indices: expected every index in \[0, 3\), got values from 0 to 3"):
        Pattern.topk(torch.tensor([[0, 3]]), 3)


WRONG_ROWS = [
    ([0, 1, 5], [0, 2, 3], r"latents: expected every index in \[0, 5\), got values from 0 to 5"),
    ([0, 1, 2], [0, 2, 4], r"starts: expected every index in \[0, 4\), got values from 0 to 4"),
    ([0, 1, 2], [0, 2, 1], "starts: expected numbers that ascend from 0"),
    ([0, 1, 2], [1, 2, 3], "starts: expected numbers that ascend from 0"),
    ([0, 1, 2], [], "starts: expected at least one number"),
    ([1, 0, 2], [0, 2, 3], "latents: expected those of a token to ascend, each at most once"),
    ([1, 1, 2], [0, 2, 3], "latents: expected those of a token to ascend, each at most once"),
    ([0, 4, 2], [0, 2, 3], "latents: expected latents below 4 in the first 3 places"),
    ([0, 1, 2], [0, 1, 2], "and 4 in the others"),
]


@pytest.mark.parametrize(("latents", "starts", "message"), WRONG_ROWS)
def test_rows_that_are_none_are_refused(latents: list[int], starts: list[int], message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        Pattern.rows(torch.tensor(latents), torch.tensor(starts, dtype=torch.int64), 4)


def test_leading_dimensions_of_other_tokens_are_refused() -> None:
    pattern = Pattern.topk(torch.tensor([[0, 1], [2, 3]]), 4)
    with pytest.raises(ShapeError, match=r"batch_shape: expected a product of 2, got \[3, 5\]"):
        SparseCode(pattern, torch.zeros(2, 2), (3, 5))


def test_a_code_of_any_leading_dimensions(generator: torch.Generator) -> None:
    top_indices, top_acts = torch.randint(0, 9, (2, 4, 3), generator=generator), torch.rand(2, 4, 3)
    code = SparseCode.topk(top_acts, top_indices, 9)
    assert code.shape == (2, 4)
    assert code.acts.shape == (8, 3)
    assert torch.equal(code.top_acts, top_acts)
    assert torch.equal(code.top_indices, top_indices)
    dense = code.to_dense()
    assert dense.shape == (2, 4, 9)
    assert torch.equal(dense.view(8, 9), dense_of(code.pattern, code.acts))
    assert torch.equal(code.replace(code.acts * 2).to_dense(), 2 * dense)
    one = SparseCode.topk(top_acts[0, 0], top_indices[0, 0], 9)
    assert one.top_acts.shape == (3,)
    assert one.to_dense().shape == (9,)


def test_a_code_of_varying_length_is_no_rectangle(generator: torch.Generator) -> None:
    pattern = ragged([2, 0, 5], 9, generator, spare=2)
    acts = torch.rand(9, generator=generator).requires_grad_()
    code = SparseCode(pattern, acts)
    for name in ("top_acts", "top_indices"):
        with pytest.raises(ConfigError, match=rf"{name}: tokens .* different numbers of latents: read acts"):
            getattr(code, name)
    assert torch.equal(code.to_dense(), dense_of(pattern, acts))
    (grad,) = torch.autograd.grad(code.to_dense().sum(), acts)
    assert grad.tolist() == [1.0] * 7 + [0.0] * 2


def test_what_is_no_code_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"acts: expected the shape \[2, 3\], got \[3, 2\]"):
        SparseCode(Pattern.topk(torch.zeros(2, 3, dtype=torch.int64), 4), torch.zeros(3, 2))
    with pytest.raises(DtypeError, match=r"pattern: expected a Pattern, got Tensor"):
        SparseCode(torch.zeros(2, 3), torch.zeros(2, 3))  # type: ignore[arg-type]
    with pytest.raises(DtypeError, match=r"code: expected a SparseCode, .* got tuple"):
        decode((torch.zeros(2, 3), torch.zeros(2, 3)), torch.zeros(4, 2))  # type: ignore[arg-type]
    with pytest.raises(DtypeError, match=r"index: expected a LatentIndex, from Pattern.index, got NoneType"):
        latent_rows(None, torch.ones(4, 3), torch.ones(4, 5))  # type: ignore[arg-type]


def test_an_overflow_is_told_and_the_first_entries_are_there(generator: torch.Generator) -> None:
    full = ragged([2, 4, 3], 9, generator)
    assert full.overflowed is None
    latents, starts = full.latents[:5], full.starts.clamp_max(5)  # type: ignore[union-attr]
    cut = Pattern(latents, 9, starts, torch.tensor(9))
    assert cut.overflowed is not None
    assert bool(cut.overflowed)
    assert cut.counts.tolist() == [2, 3, 0]
    assert not bool(Pattern(latents, 9, starts, torch.tensor(5)).overflowed)


def _gradient(code: SparseCode) -> Tensor:
    W = torch.ones(9, 5).requires_grad_()
    target = torch.arange(float(code.pattern.B))[:, None].expand(-1, 5)
    (decode(code, W).sum() + decode_loss(code, W, None, target).loss).backward()
    assert W.grad is not None
    return W.grad


def _written(latents: Tensor, way: str) -> None:
    other = torch.tensor([0, 2, 5, 1])
    if way == "in place":
        latents.copy_(other.view_as(latents))
    elif way == "a view":
        latents.view(-1)[:] = other
    elif way == ".data":
        latents.data.copy_(other.view_as(latents))
    else:
        latents.numpy()[...] = other.view_as(latents).numpy()


@pytest.mark.parametrize("way", ["in place", "a view", ".data", "numpy"])
@pytest.mark.parametrize("varying", [False, True])
def test_an_index_cannot_be_stale(way: str, varying: bool) -> None:
    latents = torch.tensor([[1, 7], [3, 8]])
    starts = torch.tensor([0, 3, 4])
    pattern = Pattern.rows(torch.tensor([1, 3, 7, 8]), starts, 9) if varying else Pattern.topk(latents, 9)
    code = SparseCode(pattern, torch.ones(pattern.latents.shape))
    before, index = _gradient(code), pattern.index
    assert pattern.index is index
    _written(pattern.latents, way)
    assert pattern.index is not index
    after = _gradient(code)
    assert before.sum(1).nonzero()[:, 0].tolist() == [1, 3, 7, 8]
    assert after.sum(1).nonzero()[:, 0].tolist() == [0, 1, 2, 5]


@pytest.mark.parametrize("way", ["in place", ".data"])
def test_an_index_is_of_the_starts_as_they_are(way: str) -> None:
    pattern = Pattern.rows(torch.tensor([1, 3, 7, 8]), torch.tensor([0, 3, 4]), 9)
    assert pattern.starts is not None
    assert pattern.index.entry_tokens.tolist() == [0, 0, 0, 1]
    (pattern.starts if way == "in place" else pattern.starts.data)[1] = 1
    assert pattern.index.entry_tokens.tolist() == [0, 1, 1, 1]


def test_an_index_is_shared_by_other_values_and_built_in_inference_mode(generator: torch.Generator) -> None:
    with torch.inference_mode():
        code = SparseCode.topk(torch.ones(4, 3), torch.randint(0, 9, (4, 3), generator=generator), 9)
        assert code.replace(code.acts * 2).pattern.index is code.pattern.index


def test_an_index_of_inference_mode_serves_gradients_too() -> None:
    pattern = Pattern.rows(torch.tensor([1, 3, 7, 8]), torch.tensor([0, 3, 4]), 9)
    with torch.inference_mode():
        assert pattern.index.counts.sum() == 4  # as somebody logs
    acts, scale = torch.ones(4, requires_grad=True), torch.ones(2, requires_grad=True)
    (acts[pattern.index.entries] * scale[pattern.index.entry_tokens]).sum().backward()
    assert scale.grad is not None
    assert scale.grad.tolist() == [3.0, 1.0]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler's own
def test_an_index_that_is_traced_is_that_of_each_call() -> None:
    pattern = Pattern.topk(torch.tensor([[1, 7], [3, 8]]), 9)
    counts = torch.compile(lambda of: of.index.counts, backend="eager")
    assert counts(pattern).nonzero()[:, 0].tolist() == [1, 3, 7, 8]
    pattern.latents[0, 0] = 2
    assert counts(pattern).nonzero()[:, 0].tolist() == [2, 3, 7, 8]
    assert pattern.index.counts.nonzero()[:, 0].tolist() == [2, 3, 7, 8]
