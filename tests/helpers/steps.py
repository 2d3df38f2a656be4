"""One step through all operations, for tests that compare two ways of running it."""

from __future__ import annotations

import torch
from torch import Tensor

from flashsae.ops import SparseCode, decode, decode_loss, encode_topk
from flashsae.ops.validate import Precision
from flashsae.testing import integer_inputs

Tensors = dict[str, Tensor]
PARAMETERS = ("x", "W_enc_T", "b_enc", "W_dec", "b_dec")


def step_inputs(
    B: int, d: int, n: int, generator: torch.Generator, *, integer: bool, dtype: torch.dtype = torch.float32
) -> Tensors:
    """Return parameters of a step. Integers are -1, 0 and 1, the weights mostly 0, so that sums stay small."""
    shapes = {"x": (B, d), "W_enc_T": (n, d), "b_enc": (n,), "W_dec": (n, d), "b_dec": (d,), "upstream": (B, d)}
    if not integer:
        return {name: torch.randn(*shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    inputs = {name: integer_inputs(*shape, generator=generator, largest=1) for name, shape in shapes.items()}
    for name in ("W_enc_T", "W_dec"):
        inputs[name] *= torch.rand(n, d, generator=generator) < min(1.0, 12 / d)
    return {name: tensor.to(dtype) for name, tensor in inputs.items()}


def leaves(inputs: Tensors) -> Tensors:
    """Return the same tensors, those that are float as leaves that want a gradient."""
    return {n: t.detach().requires_grad_() if t.is_floating_point() else t for n, t in inputs.items()}


def whole_step(inputs: Tensors, k: int, precision: Precision | None = None) -> Tensors:
    """Encode, select also by every second latent, decode, compare; return every result and all gradients."""
    p = leaves(inputs)
    scale = (torch.arange(len(p["b_enc"]), device=p["x"].device) % 2).float()

    def encode(k: int, key_scale: Tensor | None = None) -> SparseCode:
        code = encode_topk(
            p["x"], p["W_enc_T"], p["b_enc"], k, b_dec=p["b_dec"], key_scale=key_scale, precision=precision
        )
        return code.replace(code.acts.relu())

    code, other = encode(k), encode(max(1, k // 2), scale)
    loss, x_hat, residual = decode_loss(code, p["W_dec"], p["b_dec"], p["x"], precision=precision)
    aux = decode_loss(other, p["W_dec"], None, residual, precision=precision).loss
    plain = decode(code, p["W_dec"], precision=precision)
    outputs = [loss, aux, plain]
    upstream = [torch.ones_like(loss), torch.ones_like(aux) * 2, inputs["upstream"].to(plain.dtype)]
    grads = torch.autograd.grad(outputs, [p[n] for n in PARAMETERS], upstream)
    result = {"loss": loss, "aux": aux, "plain": plain, "x_hat": x_hat, "residual": residual}
    result |= {"top_acts": code.acts, "top_indices": code.pattern.latents}
    result |= {"other_acts": other.acts, "other_indices": other.pattern.latents}
    return {**{n: t.detach() for n, t in result.items()}, **{f"grad {n}": g for n, g in zip(PARAMETERS, grads)}}
