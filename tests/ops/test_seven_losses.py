"""The losses of seven kinds of SAE, a few lines each on these operations, beside dense autograd in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flashsae.ops import (
    SparseCode,
    decode_loss,
    encode_above,
    encode_batch_topk,
    encode_topk,
    per_latent,
)
from flashsae.testing import assert_as_accurate
from helpers.steps import Tensors, leaves

B, D, D_OUT, N, K = 40, 8, 11, 64, 4
EPS = 0.5


class Jump(torch.autograd.Function):
    """JumpReLU and its step, with the gradients of straight-through estimators (Rajamanoharan et al. 2024)."""

    @staticmethod
    def forward(ctx: Any, pre_acts: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(pre_acts, threshold)
        is_on = (pre_acts > threshold).to(pre_acts.dtype)
        return pre_acts * is_on, is_on

    @staticmethod
    def backward(ctx: Any, grad_acts: Tensor, grad_is_on: Tensor) -> tuple[Tensor, Tensor]:
        pre_acts, threshold = ctx.saved_tensors
        kernel = ((pre_acts - threshold).abs() < EPS / 2).to(pre_acts.dtype) / EPS
        return grad_acts * (pre_acts > threshold), -kernel * (threshold * grad_acts + grad_is_on)


def rectified(code: SparseCode) -> SparseCode:
    return code.replace(code.acts.relu())


def topk(p: Tensors) -> Tensor:
    code = encode_topk(p["x"], p["W_enc_T"], p["b_enc"], K, b_dec=p["b_dec"])
    return decode_loss(rectified(code), p["W_dec"], p["b_dec"], p["x"]).loss


def transcoder(p: Tensors) -> Tensor:
    code = encode_topk(p["x"], p["W_enc_T"], p["b_enc"], K)
    return decode_loss(rectified(code), p["W_out"], p["b_out"], p["y"]).loss


def batch_topk(p: Tensors, prefixes: tuple[int, ...] | None = None) -> Tensor:
    code = encode_batch_topk(p["x"], p["W_enc_T"], p["b_enc"], K, b_dec=p["b_dec"])
    weights = None if prefixes is None else [1.0] * len(prefixes)
    return decode_loss(
        rectified(code), p["W_dec"], p["b_dec"], p["x"], prefixes=prefixes, level_weights=weights
    ).loss  # fmt: skip


def matryoshka(p: Tensors) -> Tensor:
    return batch_topk(p, prefixes=(8, 24, N))


def relu(p: Tensors) -> Tensor:
    code = encode_above(p["x"], p["W_enc_T"], p["b_enc"], 0.0, b_dec=p["b_dec"])
    norms = per_latent(p["W_dec"].norm(dim=1), code.pattern)
    return decode_loss(code, p["W_dec"], p["b_dec"], p["x"]).loss + 0.1 * (code.acts * norms).sum()


def jump_relu(p: Tensors) -> Tensor:
    threshold = p["log_threshold"].exp()  # what lies just below has a gradient too
    code = encode_above(p["x"], p["W_enc_T"], p["b_enc"], threshold.detach() - EPS / 2, b_dec=p["b_dec"])
    acts, is_on = Jump.apply(code.acts, per_latent(threshold, code.pattern))
    return decode_loss(code.replace(acts), p["W_dec"], p["b_dec"], p["x"]).loss + 0.3 * is_on.sum()


def gated(p: Tensors) -> Tensor:
    gate = encode_above(p["x"], p["W_enc_T"], p["b_enc"], 0.0, b_dec=p["b_dec"])
    look = {name: per_latent(p[name], gate.pattern) for name in ("b_enc", "r_mag", "b_mag")}
    acts = ((gate.acts - look["b_enc"]) * look["r_mag"].exp() + look["b_mag"]).relu()
    aux = decode_loss(gate, p["W_dec"].detach(), p["b_dec"].detach(), p["x"]).loss
    return decode_loss(gate.replace(acts), p["W_dec"], p["b_dec"], p["x"]).loss + 0.1 * gate.acts.sum() + aux


def dense(name: str, p: Tensors) -> Tensor:
    """Return the loss with every latent of every token written out."""
    pre_acts = (p["x"] if name == "transcoder" else p["x"] - p["b_dec"]) @ p["W_enc_T"].T + p["b_enc"]

    def error(acts: Tensor, W: Tensor = p["W_dec"], b: Tensor = p["b_dec"], target: Tensor = p["x"]) -> Tensor:
        return (target - acts @ W - b).square().sum()

    def kept(flat: Tensor, k: int) -> Tensor:
        return torch.zeros_like(flat).scatter(-1, flat.topk(k).indices, 1.0) * flat.relu()

    if name == "topk":
        return error(kept(pre_acts, K))
    if name == "transcoder":
        return error(kept(pre_acts, K), p["W_out"], p["b_out"], p["y"])
    if name in ("batch_topk", "matryoshka"):
        acts = kept(pre_acts.flatten(), B * K).view(B, N)
        sizes = (8, 24, N) if name == "matryoshka" else (N,)
        return torch.stack([error(acts[:, :size], p["W_dec"][:size]) for size in sizes]).sum()
    if name == "relu":
        return error(pre_acts.relu()) + 0.1 * (pre_acts.relu() * p["W_dec"].norm(dim=1)).sum()
    if name == "jump_relu":
        acts, is_on = Jump.apply(pre_acts, p["log_threshold"].exp().expand_as(pre_acts))
        return error(acts) + 0.3 * is_on.sum()
    acts = ((pre_acts - p["b_enc"]) * p["r_mag"].exp() + p["b_mag"]).relu() * (pre_acts > 0)
    return error(acts) + 0.1 * pre_acts.relu().sum() + error(pre_acts.relu(), p["W_dec"].detach(), p["b_dec"].detach())


LOSSES: dict[str, tuple[Callable[[Tensors], Tensor], tuple[str, ...]]] = {
    "topk": (topk, ()),
    "transcoder": (transcoder, ("W_out", "b_out")),
    "batch_topk": (batch_topk, ()),
    "matryoshka": (matryoshka, ()),
    "relu": (relu, ()),
    "jump_relu": (jump_relu, ("log_threshold",)),
    "gated": (gated, ("r_mag", "b_mag")),
}


def inputs(generator: torch.Generator) -> Tensors:
    """Return float64 numbers that float32 holds."""
    shapes = {"x": (B, D), "y": (B, D_OUT), "W_enc_T": (N, D), "b_enc": (N,), "W_dec": (N, D), "b_dec": (D,)}
    shapes |= {"W_out": (N, D_OUT), "b_out": (D_OUT,), "log_threshold": (N,), "r_mag": (N,), "b_mag": (N,)}
    return {name: torch.randn(*shape, generator=generator).double() for name, shape in shapes.items()}


def gradients(loss: Tensor, name: str, p: Tensors) -> Tensors:
    decoder = () if name == "transcoder" else ("W_dec", "b_dec")
    wanted = ["W_enc_T", "b_enc", *decoder, *LOSSES[name][1]]
    return dict(zip(wanted, torch.autograd.grad(loss, [p[n] for n in wanted])))


@pytest.mark.parametrize("name", LOSSES)
def test_it_is_that_of_dense_autograd(name: str, generator: torch.Generator) -> None:
    given = inputs(generator)
    ours, exact = leaves(given), leaves(given)
    found, expected = LOSSES[name][0](ours), dense(name, exact)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    grads = gradients(found, name, ours)
    for n, other in gradients(expected, name, exact).items():
        torch.testing.assert_close(grads[n], other, rtol=1e-10, atol=1e-11, msg=lambda text, n=n: f"{n}: {text}")


@pytest.mark.parametrize("name", LOSSES)
def test_t1_gradients_in_float32(
    name: str, device: str, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    monkeypatch.setenv("FLASHSAE_DENSE_ABOVE", "1")
    given = inputs(generator)
    narrow = {n: t.float() for n, t in given.items()}
    ours, theirs, exact = leaves({n: t.to(device) for n, t in narrow.items()}), leaves(narrow), leaves(given)
    grads = gradients(LOSSES[name][0](ours), name, ours)
    peer = gradients(dense(name, theirs), name, theirs)
    for n, other in gradients(dense(name, exact), name, exact).items():
        assert_as_accurate(grads[n].cpu(), peer[n], other, n)
