"""Sizes of 0: kernels and the reference give the same, or refuse it in the same sentence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flashsae import ops
from flashsae.errors import ShapeError
from flashsae.ops.adam_rows import AdamRule
from flashsae.ops.latent_rows.op import column_sums
from helpers.codes import index_of
from helpers.latent_pass import BACKENDS, squares_on, step_on

ENCODERS: dict[str, Callable[..., Any]] = {
    "encode_topk": lambda *weights, **options: ops.encode_topk(*weights, 1, **options),
    "encode_batch_topk": lambda *weights, **options: ops.encode_batch_topk(*weights, 1, **options),
    "encode_above": lambda *weights, **options: ops.encode_above(*weights, 0.0, **options),
    "pre_acts": lambda x, W, b, **options: ops.pre_acts(x, W, b, _pattern(x, 1), **options),
}


def _pattern(x: Tensor, k: int) -> ops.Pattern:
    return ops.Pattern.topk(torch.zeros(len(x), k, dtype=torch.int64, device=x.device), 40)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_want_columns_and_latents(name: str, backend: str) -> None:
    for B, n, d in ((0, 40, 0), (3, 40, 0), (3, 0, 5), (0, 0, 0)):
        p = {"x": torch.randn(B, d), "W": torch.randn(n, d), "b": torch.randn(n)}
        with pytest.raises(ShapeError, match=f"^d_sae and d_in: expected at least 1, got {n} and {d}"):
            BACKENDS[backend](lambda q: ENCODERS[name](q["x"], q["W"], q["b"]), p)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ENCODERS)
def test_without_tokens_there_is_an_empty_code_and_gradients_of_0(name: str, backend: str) -> None:
    def gradients(p: dict[str, Tensor]) -> dict[str, Tensor]:
        leaves = {each: tensor.clone().requires_grad_() for each, tensor in p.items()}
        found = ENCODERS[name](leaves["x"], leaves["W"], leaves["b"], b_dec=leaves["b_dec"])
        acts = found if isinstance(found, Tensor) else found.acts
        acts.sum().backward()
        return {"acts": acts.detach(), **{each: leaf.grad for each, leaf in leaves.items()}}  # type: ignore[dict-item]

    p = {"x": torch.randn(0, 5), "W": torch.randn(40, 5), "b": torch.randn(40), "b_dec": torch.randn(5)}
    found = BACKENDS[backend](gradients, p)
    assert not found.pop("acts").numel()
    for each, gradient in found.items():
        assert torch.equal(gradient, torch.zeros_like(p[each])), each


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_pattern_without_places_has_no_pre_activations_and_gradients_of_0(backend: str) -> None:
    def gradients(p: dict[str, Tensor]) -> dict[str, Tensor]:
        leaves = {each: tensor.clone().requires_grad_() for each, tensor in p.items()}
        values = ops.pre_acts(leaves["x"], leaves["W"], leaves["b"], _pattern(p["x"], 0), b_dec=leaves["b_dec"])
        values.sum().backward()
        return {"values": values.detach(), **{each: leaf.grad for each, leaf in leaves.items()}}  # type: ignore[dict-item]

    p = {"x": torch.randn(3, 5), "W": torch.randn(40, 5), "b": torch.randn(40), "b_dec": torch.randn(5)}
    found = BACKENDS[backend](gradients, p)
    assert found.pop("values").shape == (3, 0)
    for each, gradient in found.items():
        assert torch.equal(gradient, torch.zeros_like(p[each])), each


@pytest.mark.usefixtures("sparse_kernels")
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_without_columns_are_summed_to_such(backend: str) -> None:
    p = {"latents": torch.tensor([[0, 2], [2, 1]]), "coeffs": torch.randn(2, 2), "rows": torch.randn(2, 0)}

    def sums(q: dict[str, Tensor]) -> dict[str, Tensor]:
        rows = ops.latent_rows(index_of(q["latents"], 5), q["coeffs"], q["rows"])
        return {"rows": rows, "column": column_sums(q["coeffs"][:, 0].contiguous(), q["rows"], torch.float32)}

    found = BACKENDS[backend](sums, p)
    assert found["rows"].shape == (5, 0)
    assert found["column"].shape == (0,)


@pytest.mark.usefixtures("sparse_kernels")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("unit_norm", [False, True])
def test_a_step_of_no_columns_or_no_rows_changes_nothing(backend: str, unit_norm: bool) -> None:
    for n, d in ((5, 0), (0, 5)):
        p = {name: torch.randn(n, d) for name in ("weights", "exp_avg", "exp_avg_sq", "dense")}
        if n:
            p |= {"top_indices": torch.tensor([[0, 2]]), "coeffs": torch.randn(1, 2), "rows": torch.randn(1, d)}
        after = step_on(backend, p, AdamRule(unit_norm=unit_norm))
        assert {tuple(tensor.shape) for tensor in after.values()} == {(n, d)}
        assert torch.equal(squares_on(backend, p, unit_norm), torch.zeros(n))
