"""A step of the latent pass: its inputs, run on either backend, and written out densely with no thought of speed."""

from __future__ import annotations

import torch
from torch import Tensor

from flashsae.ops.adam_rows import AdamRule, adam_rows, row_squares
from flashsae.ops.adam_rows.reference import merge_halves, split_halves
from flashsae.ops.factors import RowGradient, SparseFactor
from flashsae.ops.latent_rows.reference import RUN
from flashsae.testing import integer_inputs
from helpers.codes import index_of
from helpers.on_both import on_kernels, on_reference
from helpers.steps import Tensors

F32, F64 = torch.float32, torch.float64
LR = 1e-2
PARTS = ["nothing", "sparse", "dense", "slots", "sparse dense", "sparse slots"]
"""What gradients consist of: `slots` are rows of some latents only, as AuxK leaves them."""

SHAPES = [(0, 2, 5, 3), (1, 1, 1, 1), (9, 1, 6, 7), (37, 3, 11, 37), (5, 2, 4, 130), (5, 2, 3, 600), (RUN + 9, 2, 3, 5)]
"""B, k, n and d."""

EVERY_NAN = torch.tensor([0x7FC00000, 0x7F800001, 0x7FFFFFFF, -1, -0x400000, -0x7FFFFF]).int().view(F32)
"""Of both signs, among them those whose bits a rounding would carry over."""

BACKENDS = {"kernels": on_kernels, "reference": on_reference}


def pass_inputs(
    B: int, k: int, n: int, d: int, parts: str, generator: torch.Generator, *, integer: bool, rows: torch.dtype = F32
) -> Tensors:
    """Return a state and the named parts of a gradient. Integer rows of weights are unit vectors, so that they project
    exactly."""

    def numbers(*shape: int) -> Tensor:
        if integer:
            return integer_inputs(*shape, generator=generator)
        return torch.randn(*shape, generator=generator)

    weights = torch.eye(d)[torch.randint(0, d, (n,), generator=generator)]
    weights *= torch.randint(0, 2, (n, 1), generator=generator) * 2.0 - 1
    if not integer:
        weights = torch.nn.functional.normalize(numbers(n, d), dim=1)
    p = {"weights": weights, "exp_avg": numbers(n, d), "exp_avg_sq": numbers(n, d).square() + 1}
    if "sparse" in parts:
        top_indices = torch.randint(0, n, (B, k), generator=generator)
        top_indices[:, 0] = n // 2  # active on every token
        p |= {"top_indices": top_indices, "coeffs": numbers(B, k), "rows": numbers(B, d).to(rows)}
    if "dense" in parts:
        p["dense"] = numbers(n, d).to(rows)
    if "slots" in parts:
        p["dense"] = numbers(max(1, n // 2), d).to(rows)
        order = torch.randperm(n, generator=generator).int()
        p["slots"] = torch.where(order < len(p["dense"]), order, -1)
    return p


def row_gradient(p: Tensors) -> RowGradient:
    """Return the parts of a gradient as both operations take it."""
    sparse = None
    if "rows" in p:
        sparse = SparseFactor(index_of(p["top_indices"], len(p["weights"])), p["coeffs"], p["rows"])
    return RowGradient(sparse, p.get("dense"), p.get("slots"))


def scalars(rule: AdamRule, step: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Return lr, step and bias_correction as the optimiser makes them."""
    wide = {"dtype": F64, "device": device}
    t = torch.tensor(float(step), **wide)
    return torch.tensor(LR, **wide), t, 1 - torch.tensor([rule.beta1, rule.beta2], **wide) ** t


def step_on(
    backend: str, p: Tensors, rule: AdamRule, step: int = 3, *, split: bool = False, moments: torch.dtype = F32
) -> Tensors:
    """Return the state after a step; split weights come back merged, and their high halves too."""

    def one_step(q: Tensors) -> Tensors:
        weights, low = split_halves(q["weights"]) if split else (q["weights"].clone(), None)
        dtype = moments if q["exp_avg"].dtype == F32 else F64
        exp_avg, exp_avg_sq = (q[name].to(dtype, copy=True) for name in ("exp_avg", "exp_avg_sq"))
        lr, t, bias_correction = scalars(rule, step, weights.device)
        adam_rows(weights, (exp_avg, exp_avg_sq), row_gradient(q), lr, t, bias_correction, rule, low=low)
        after = {"weights": weights, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
        return after if low is None else {**after, "weights": merge_halves(weights, low), "high": weights}

    return BACKENDS[backend](one_step, p)


def squares_on(backend: str, p: Tensors, unit_norm: bool) -> Tensor:
    """Return the squared norm of each row of the gradient."""

    def squares(q: Tensors) -> Tensors:
        return {"squares": row_squares(q["weights"], row_gradient(q), unit_norm)}

    return BACKENDS[backend](squares, p)["squares"]


def dense_gradient(p: Tensors, unit_norm: bool) -> Tensor:
    """Return the gradient that the parts are."""
    gradient = torch.zeros_like(p["weights"])
    if "rows" in p:
        code = p["coeffs"].new_zeros(len(p["coeffs"]), len(gradient)).scatter_add(1, p["top_indices"], p["coeffs"])
        gradient += code.T @ p["rows"].to(code.dtype)
    if "dense" in p:
        slots = p.get("slots", torch.arange(len(gradient))).tolist()
        for latent, slot in enumerate(slots):
            if slot >= 0:
                gradient[latent] += p["dense"][slot]
    if unit_norm:
        gradient -= (gradient * p["weights"]).sum(1, keepdim=True) * p["weights"]
    return gradient


def dense_step(p: Tensors, rule: AdamRule, step: int = 3) -> Tensors:
    """Do what the docstring of `adam_rows` says."""
    gradient = dense_gradient(p, rule.unit_norm) + rule.weight_decay * p["weights"]
    exp_avg = rule.beta1 * p["exp_avg"] + (1 - rule.beta1) * gradient
    exp_avg_sq = rule.beta2 * p["exp_avg_sq"] + (1 - rule.beta2) * gradient**2
    first, second = exp_avg / (1 - rule.beta1**step), exp_avg_sq / (1 - rule.beta2**step)
    weights = p["weights"] - LR * first / (second.sqrt() + rule.eps)
    if rule.unit_norm:
        weights /= weights.norm(dim=1, keepdim=True)
    return {"weights": weights, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
