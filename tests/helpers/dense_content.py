"""SAEs as values at random, and what they do to tokens, densely and in float64, by the formulas of their papers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashsae.formats.content import Content
from flashsae.formats.selection import split


def made(
    architecture: str,
    d_in: int = 7,
    d_sae: int = 37,
    *,
    dtype: torch.dtype = torch.float32,
    unit_rows: bool = True,
    apply_b_dec_to_input: bool | None = None,
    metadata: dict[str, Any] | None = None,
    **settings: Any,
) -> Content:
    """Return an SAE with random parameters; rows of its decoder have norm 1, if not asked otherwise."""
    generator = torch.Generator().manual_seed(d_in * d_sae)
    outer, base = split(architecture)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    W_dec = random(d_sae, d_in)
    W_dec = W_dec / W_dec.norm(dim=1, keepdim=True) if unit_rows else W_dec
    tensors = {"W_enc_T": random(d_sae, d_in), "b_enc": random(d_sae), "W_dec": W_dec, "b_dec": random(d_in)}
    tensors |= {"threshold": random().abs()} if base == "batch_topk" else {}
    tensors |= {"threshold": random(d_sae).abs()} if base == "jump_relu" else {}
    tensors |= {"r_mag": random(d_sae) / 2, "b_mag": random(d_sae)} if base == "gated" else {}
    tensors |= {"W_skip": random(d_in, d_in)} if outer == "skip_transcoder" else {}
    needs_k = base in ("topk", "batch_topk", "abs_topk", "hierarchical_topk")
    subtracts = not outer if apply_b_dec_to_input is None else apply_b_dec_to_input
    return Content(
        architecture,
        {**({"k": 5} if needs_k else {}), **settings},
        {name: tensor.to(dtype) for name, tensor in tensors.items()},
        subtracts,
        metadata=metadata or {},
    )


def codes(content: Content, x: Tensor) -> Tensor:
    """Return the latents [B, d_sae] of tokens [B, d_in], float64."""
    t = {name: tensor.double() for name, tensor in content.tensors.items()}
    base, x = split(content.architecture)[1], x.double()
    raw = (x - t["b_dec"] if content.apply_b_dec_to_input else x) @ t["W_enc_T"].T
    z = raw + t["b_enc"]
    if base in ("topk", "hierarchical_topk", "abs_topk"):
        key = z.abs() if base == "abs_topk" else z.relu()
        chosen = torch.zeros_like(z).scatter(1, key.topk(content.settings["k"], dim=1).indices, 1.0)
        return (z if base == "abs_topk" else z.relu()) * chosen
    if base in ("batch_topk", "jump_relu"):
        return z.relu() * (z > t["threshold"])
    if base == "gated":
        return (raw * t["r_mag"].exp() + t["b_mag"]).relu() * (z > 0)
    assert base == "relu"
    return z.relu()


def reconstructed(content: Content, x: Tensor) -> Tensor:
    """Return the reconstructions [B, d_out] of tokens, float64."""
    t = {name: tensor.double() for name, tensor in content.tensors.items()}
    skip = x.double() @ t["W_skip"].T if "W_skip" in t else 0.0
    decoded: Tensor = codes(content, x) @ t["W_dec"] + t["b_dec"] + skip
    return decoded


def same(one: Content, other: Content) -> bool:
    """Tell whether two hold the same, bit for bit."""
    same_tensors = one.tensors.keys() == other.tensors.keys() and all(
        tensor.dtype == other.tensors[name].dtype and torch.equal(tensor, other.tensors[name])
        for name, tensor in one.tensors.items()
    )
    flags = ("architecture", "apply_b_dec_to_input", "normalize_activations")
    return same_tensors and all(getattr(one, name) == getattr(other, name) for name in flags)
