from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from flashsae.errors import ConfigError, DtypeError, ShapeError
from flashsae.ops import LatentIndex, build_index, decode_loss, decode_sparse, latent_rows


@pytest.mark.parametrize(("B", "k", "d_sae"), [(0, 3, 4), (1, 1, 1), (37, 5, 11), (8, 4, 1000)])
def test_lists_are_those_of_a_plain_loop(B: int, k: int, d_sae: int, generator: torch.Generator) -> None:
    top_indices = torch.randint(0, d_sae, (B, k), generator=generator)
    index = build_index(top_indices, d_sae)
    expected: list[list[int]] = [[] for _ in range(d_sae)]
    for entry, latent in enumerate(top_indices.flatten().tolist()):
        expected[latent].append(entry)
    bounds = index.offsets.tolist()
    assert [index.entries[a:b].tolist() for a, b in itertools.pairwise(bounds)] == expected
    assert index.tokens.tolist() == [entry // k for entries in expected for entry in entries]
    assert index.d_sae == d_sae


def test_an_index_out_of_range_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"top_indices: expected every index in \[0, 3\), got values from 0 to 3"):
        build_index(torch.tensor([[0, 3]]), 3)


def _decoded(index: LatentIndex | None, top_indices: Tensor, *, loss: bool) -> Tensor:
    acts, W = torch.ones(4, 3), torch.ones(9, 5)
    if loss:
        return decode_loss(acts, top_indices, W, None, torch.ones(4, 5), index=index).loss
    return decode_sparse(acts, top_indices, W, index=index)


@pytest.mark.parametrize("loss", [False, True])
def test_an_index_serves_the_indices_that_it_was_built_of(loss: bool, generator: torch.Generator) -> None:
    top_indices = torch.randint(0, 9, (4, 3), generator=generator)
    index = build_index(top_indices, 9)
    for same in (top_indices, top_indices.view(2, 2, 3).reshape(-1, 3), top_indices.detach(), top_indices[:]):
        _decoded(index, same, loss=loss)
    with torch.inference_mode():
        _decoded(build_index(top_indices + 0, 9).of(top_indices), top_indices, loss=loss)
    others = (
        top_indices.clone(),
        (top_indices + 1) % 9,
        top_indices.flip(0),
        top_indices.int(),
        top_indices.T.reshape(4, 3),
    )
    for other in others:
        with pytest.raises(ConfigError, match=r"index: expected that of top_indices, .* build it again"):
            _decoded(index, other, loss=loss)
    top_indices[0, 0] = (top_indices[0, 0] + 1) % 9
    with pytest.raises(ConfigError, match="or of these before they were changed"):
        _decoded(index, top_indices, loss=loss)
    _decoded(build_index(top_indices, 9), top_indices, loss=loss)


def test_an_index_from_nowhere_is_refused(generator: torch.Generator) -> None:
    top_indices = torch.randint(0, 9, (4, 3), generator=generator)
    index = build_index(top_indices, 9)
    with pytest.raises(ConfigError, match="expected that of top_indices"):
        _decoded(LatentIndex(*index[:4]), top_indices, loss=False)
    with pytest.raises(DtypeError, match="index: expected a LatentIndex, from build_index, got tuple"):
        _decoded(tuple(index), top_indices, loss=False)  # type: ignore[arg-type]
    with pytest.raises(DtypeError, match="index: expected a LatentIndex, from build_index, got NoneType"):
        latent_rows(None, torch.ones(4, 3), torch.ones(4, 5))  # type: ignore[arg-type]


def test_memory_that_is_used_again_is_not_taken_for_the_same() -> None:
    index = build_index(torch.zeros(4, 3, dtype=torch.int64), 9)  # nobody else holds these indices
    others = [torch.ones(4, 3, dtype=torch.int64) for _ in range(64)]
    assert not any(index.is_of(other) for other in others)
