"""The squared norms of rows of a gradient, for clipping: of the gradient that the latent pass would use."""

from __future__ import annotations

import pytest
import torch

from flashsae.errors import DtypeError, ShapeError
from flashsae.ops.adam_rows import row_squares
from flashsae.ops.adam_rows.reference import split_halves
from flashsae.ops.factors import RowGradient
from flashsae.ops.latent_rows.reference import RUN
from flashsae.testing import assert_as_accurate
from helpers.latent_pass import BACKENDS, SHAPES, dense_gradient, pass_inputs, row_gradient, squares_on
from helpers.on_both import as_float64, assert_same, on_kernels, on_reference
from helpers.steps import Tensors


def test_row_squares_are_those_written_out() -> None:
    weights = torch.tensor([[0.6, 0.8], [1.0, 0.0], [0.0, 1.0]])
    gradient = RowGradient(dense=torch.tensor([[3.0, 4.0], [3.0, 4.0]]), slots=torch.tensor([0, -1, 1]).int())
    assert row_squares(weights, gradient, unit_norm=False).tolist() == [25.0, 0.0, 25.0]
    assert row_squares(weights, gradient, unit_norm=True).tolist() == pytest.approx([0.0, 0.0, 9.0], abs=1e-10)
    assert row_squares(weights, RowGradient(), unit_norm=False).tolist() == [0.0] * 3


@pytest.mark.usefixtures("sparse_kernels")
@pytest.mark.parametrize("unit_norm", [False, True], ids=["free", "unit norm"])
@pytest.mark.parametrize("parts", ["nothing", "sparse", "sparse slots"])
@pytest.mark.parametrize(("B", "k", "n", "d"), SHAPES)
def test_t0_row_squares(
    B: int, k: int, n: int, d: int, parts: str, unit_norm: bool, generator: torch.Generator
) -> None:
    p = pass_inputs(B, k, n, d, parts, generator, integer=True)
    ours, theirs = squares_on("kernels", p, unit_norm), squares_on("reference", p, unit_norm)
    exact = dense_gradient(as_float64(p), unit_norm).square().sum(1)
    assert_same({"squares": ours}, {"squares": theirs}, {"squares": exact})


@pytest.mark.usefixtures("sparse_kernels")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("unit_norm", [False, True], ids=["free", "unit norm"])
@pytest.mark.parametrize("d", [37, 600])
def test_t1_row_squares(d: int, unit_norm: bool, backend: str, generator: torch.Generator) -> None:
    p = pass_inputs(RUN + 9, 2, 5, d, "sparse slots", generator, integer=False)
    p["weights"] *= torch.linspace(0.5, 1.5, 5)[:, None]  # norms need not be 1
    theirs = dense_gradient(p, unit_norm).square().sum(1)
    exact = dense_gradient(as_float64(p), unit_norm).square().sum(1)
    assert_as_accurate(squares_on(backend, p, unit_norm), theirs, exact)


@pytest.mark.usefixtures("sparse_kernels")
def test_row_squares_of_halves_see_whole_weights_and_in_kernels_the_high_ones(generator: torch.Generator) -> None:
    p = pass_inputs(9, 2, 5, 37, "sparse", generator, integer=False)

    def squares(q: Tensors) -> Tensors:
        high, low = split_halves(q["weights"])
        return {
            "split": row_squares(high, row_gradient(q), True, low=low),
            "whole": row_squares(q["weights"], row_gradient(q), True),
            "high": row_squares(high, row_gradient(q), True),
        }

    kernels, reference = on_kernels(squares, p), on_reference(squares, p)
    assert torch.equal(reference["split"], reference["whole"])
    assert torch.equal(kernels["split"], kernels["high"])
    assert not torch.equal(reference["high"], reference["whole"])
    before_projection = dense_gradient(p, unit_norm=False).square().sum(1)
    assert bool(((kernels["split"] - reference["whole"]).abs() <= 2**-8 * before_projection).all())


def test_gradients_and_halves_that_do_not_fit_are_named() -> None:
    weights = torch.zeros(4, 3)
    with pytest.raises(ShapeError, match=r"gradient\.dense: expected the shape \[4, 3\], got \[2, 3\]"):
        row_squares(weights, RowGradient(dense=torch.zeros(2, 3)), False)
    with pytest.raises(ShapeError, match=r"gradient\.slots: expected the shape \[4\]"):
        row_squares(weights, RowGradient(dense=torch.zeros(2, 3), slots=torch.zeros(3, dtype=torch.int32)), False)
    with pytest.raises(DtypeError, match=r"weights and low: .* got torch\.bfloat16 and torch\.int32"):
        row_squares(weights.bfloat16(), RowGradient(), False, low=weights.int())
    with pytest.raises(ShapeError, match=r"weights: expected the shape \[d_sae, d\], got \[4\]"):
        row_squares(weights[:, 0], RowGradient(), False)
