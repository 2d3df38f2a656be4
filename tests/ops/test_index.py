from __future__ import annotations

import itertools

import pytest
import torch

from flashsae.errors import ShapeError
from flashsae.ops import build_index


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
