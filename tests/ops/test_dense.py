from __future__ import annotations

import pytest
import torch

from flashsae.ops import Pattern
from flashsae.ops.dense import op as dense
from flashsae.testing import assert_as_accurate, poison_empty


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("B", "k", "n"), [(0, 3, 7), (1, 1, 1), (5, 7, 7), (9, 3, 1025), (3, 300, 2100)])
def test_distinct_entries_stand_where_they_belong(
    B: int, k: int, n: int, dtype: torch.dtype, index_dtype: torch.dtype, device: str, generator: torch.Generator
) -> None:
    acts = torch.randint(-128, 129, (B, k), generator=generator).float()  # no rounding: the interpreter cuts bfloat16
    indices = torch.rand(B, n, generator=generator).argsort(1)[:, :k]
    with poison_empty():
        code = dense.code(acts.to(device), indices.to(device, index_dtype), torch.empty(n, 2, dtype=dtype).to(device))
    expected = torch.zeros(B, n, dtype=dtype).scatter(1, indices, acts.to(dtype))
    assert code.dtype == dtype
    assert torch.equal(code.cpu(), expected)


@pytest.mark.parametrize("n", [1, 4, 60])
def test_repeated_latents_add_up(n: int, device: str, generator: torch.Generator) -> None:
    acts = torch.randn(12, 40, generator=generator)
    indices = torch.randint(0, n, (12, 40), generator=generator)
    weights = torch.empty(n, 2)
    code = dense.code(acts.to(device), indices.to(device), weights.to(device)).cpu()
    exact = torch.zeros(12, n, dtype=torch.float64).scatter_add(1, indices, acts.double())
    assert_as_accurate(code, torch.zeros(12, n).scatter_add(1, indices, acts), exact)


def test_nan_stays_in_its_place_beside_repeats(device: str) -> None:
    acts = torch.tensor([[1.0, torch.nan, 2.0, torch.inf]], device=device)
    indices = torch.tensor([[3, 1, 3, 0]], device=device)
    code = dense.code(acts, indices, torch.empty(5, 1, device=device)).cpu()
    torch.testing.assert_close(code, torch.tensor([[torch.inf, torch.nan, 0.0, 3.0, 0.0]]), equal_nan=True)


@pytest.mark.parametrize("parts", [1, 3])
def test_sums_are_those_of_the_code(
    parts: int, device: str, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flashsae.ops.dense.op._CODE_ELEMENTS", 30 * 12 // parts)
    acts, rows = torch.randn(12, 4, generator=generator), torch.randn(12, 5, generator=generator)
    indices = torch.randint(0, 30, (12, 4), generator=generator)
    pattern = Pattern.topk(indices.to(device), 30)
    grad, sums = dense.latent_rows(pattern, acts.to(device), rows.to(device), with_sums=True)
    whole = torch.zeros(12, 30).scatter_add(1, indices, acts)
    assert sums is not None
    torch.testing.assert_close(sums.cpu(), whole.sum(0))
    torch.testing.assert_close(grad.cpu(), whole.T @ rows)
    assert dense.latent_rows(pattern, acts.to(device), rows.to(device))[1] is None
