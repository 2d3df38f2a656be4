"""SAEs as others release them: numbers for tiny ones, and what is to be computed with these."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

import flashsae

D, F = 6, 40


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Return float32 numbers, the same for the same arguments."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))) * scale


def jump_relu_weights(d_in: int = D, d_out: int = D, F: int = F) -> dict[str, Tensor]:
    """Return W_enc [d_in, F], W_dec [F, d_out], b_enc, b_dec and threshold, one of them below 0 and one 0."""
    threshold = normal(F, seed=1).abs()
    threshold[:2] = torch.tensor([-0.5, 0.0])
    return {
        "W_enc": normal(d_in, F), "W_dec": normal(F, d_out, seed=2), "b_enc": normal(F, seed=3),
        "b_dec": normal(d_out, seed=4), "threshold": threshold,
    }  # fmt: skip


def jump_relu(weights: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes and reconstruction in float64 by the formula that was published."""
    w = {name: weight.double() for name, weight in weights.items()}
    pre_acts = x.double() @ w["W_enc"] + w["b_enc"]
    codes = torch.relu(pre_acts) * (pre_acts > w["threshold"])
    return codes, codes @ w["W_dec"] + w["b_dec"]


def assert_computes(place: Path, x: Tensor, codes: Tensor, x_hat: Tensor, rtol: float = 1e-12) -> flashsae.SAE:
    """Assert that what `flashsae.load` reads computes given numbers in float64, and return it.

    Args:
        place: to load.
        x: [B, d_in].
        codes, x_hat: what must come.
        rtol: of rounding: 1e-12 where weights are as they stand there, 1e-6 where they were scaled and rounded.
    """
    sae = flashsae.load(place).double()
    assert 0 < (codes > 0).double().mean() < 1
    code = sae.encode(x.double())
    torch.testing.assert_close(code.to_dense(), codes, rtol=rtol, atol=rtol)
    torch.testing.assert_close(sae(x.double()), x_hat, rtol=rtol, atol=rtol * 10)
    return sae
