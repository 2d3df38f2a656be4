from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flashsae.errors import ShapeError
from flashsae.ops import latent_rows
from flashsae.ops.latent_rows.reference import RUN, latent_sums
from flashsae.testing import assert_as_accurate, integer_inputs, poison_empty
from helpers.codes import index_of


def _dense(top_indices: Tensor, coeffs: Tensor, rows: Tensor, d_sae: int) -> Tensor:
    sparse = coeffs.new_zeros(len(coeffs), d_sae).scatter_add(1, top_indices, coeffs)
    return sparse.T @ rows


@pytest.mark.parametrize(("B", "k", "d_sae", "d"), [(0, 2, 5, 3), (1, 1, 1, 1), (37, 3, 50, 7), (2 * RUN + 1, 2, 3, 5)])
def test_t0_integers_are_bitwise_equal(B: int, k: int, d_sae: int, d: int, generator: torch.Generator) -> None:
    top_indices = torch.randint(0, d_sae, (B, k), generator=generator)
    coeffs = integer_inputs(B, k, generator=generator)
    rows = integer_inputs(B, d, generator=generator)
    index = index_of(top_indices, d_sae)
    with poison_empty():
        ours = latent_rows(index, coeffs, rows)
    assert torch.equal(ours, _dense(top_indices, coeffs, rows, d_sae))
    assert torch.equal(latent_sums(index, coeffs), _dense(top_indices, coeffs, torch.ones(B, 1), d_sae)[:, 0])


@pytest.mark.parametrize("length", [RUN - 1, RUN, RUN + 1, 20 * RUN])
def test_t1_a_latent_active_on_every_token(length: int, generator: torch.Generator) -> None:
    top_indices = torch.zeros(length, 1, dtype=torch.int64)
    coeffs, rows = torch.rand(length, 1, generator=generator), torch.randn(length, 16, generator=generator)
    ours = latent_rows(index_of(top_indices, 2), coeffs, rows)
    theirs = _dense(top_indices, coeffs, rows, 2)
    exact = _dense(top_indices, coeffs.double(), rows.double(), 2)
    assert_as_accurate(ours, theirs, exact)


def test_long_runs_are_cut_and_so_round_less(generator: torch.Generator) -> None:
    length = 32 * RUN
    coeffs, rows = torch.rand(length, 1, generator=generator), torch.randn(length, 64, generator=generator)
    index = index_of(torch.zeros(length, 1, dtype=torch.int64), 1)
    exact = coeffs.double().T @ rows.double()
    one_bag = torch.arange(length), rows, torch.zeros(1, dtype=torch.int64)
    running = torch.nn.functional.embedding_bag(*one_bag, mode="sum", per_sample_weights=coeffs[:, 0])
    error = (latent_rows(index, coeffs, rows).double() - exact).abs().max()
    assert error < (running.double() - exact).abs().max() / 2


def test_t3_two_runs_are_equal(generator: torch.Generator) -> None:
    index = index_of(torch.randint(0, 9, (999, 4), generator=generator), 9)
    coeffs, rows = torch.randn(999, 4, generator=generator), torch.randn(999, 33, generator=generator)
    assert torch.equal(latent_rows(index, coeffs, rows), latent_rows(index, coeffs, rows))


def test_coefficients_of_another_code_are_refused() -> None:
    index = index_of(torch.zeros(4, 2, dtype=torch.int64), 3)
    with pytest.raises(ShapeError, match="coeffs: expected 8 entries"):
        latent_rows(index, torch.zeros(5, 2), torch.zeros(5, 7))
    with pytest.raises(ShapeError, match=r"rows: expected the shape \[4, d\], got \[5, 7\]"):
        latent_rows(index, torch.zeros(4, 2), torch.zeros(5, 7))
