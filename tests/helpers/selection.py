"""Inputs that strain the certified selection, and how its mistakes are counted (tier T2)."""

from __future__ import annotations

import torch
from torch import Tensor


def hard_inputs(kind: str, B: int, d: int, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return x, W_enc_T and b_enc that strain the error bounds of the certified selection."""
    x, W = torch.randn(B, d, generator=generator), torch.randn(n, d, generator=generator)
    bias = torch.randn(n, generator=generator)
    if kind == "near ties":
        W = W[:1] * (1 + 2.0**-22 * torch.randint(-2, 3, (n, d), generator=generator))
        bias = torch.zeros(n)
    elif kind == "huge and tiny rows":
        x *= 10.0 ** torch.tensor([18, -30, 0, 30, -36])[torch.arange(B) % 5, None]
        W *= 10.0 ** torch.tensor([0, 1, -3])[torch.arange(n) % 3, None]
    elif kind == "cancellation":
        half = d // 2
        x[:, half : 2 * half] = x[:, :half] * (1 + 1e-4 * torch.randn(B, half, generator=generator))
        W[:, half : 2 * half] = -W[:, :half]
        bias *= 1e-4
    elif kind == "denormal":
        x, bias = x * 1e-40, bias * 1e-40
    elif kind == "wide range within rows":
        x *= 10.0 ** torch.randint(-6, 7, x.shape, generator=generator)
        W *= 10.0 ** torch.randint(-6, 7, W.shape, generator=generator)
    return x, W, bias


HARD = ["normal", "near ties", "huge and tiny rows", "cancellation", "denormal", "wide range within rows"]


def selection_mistakes(
    x: Tensor, W: Tensor, bias: Tensor, indices: Tensor, *, magnitude: bool = False
) -> tuple[int, int]:
    """Count the wrong picks, and those that float32 rounding excuses: judged in float64.

    A pick outside the float64 selection is wrong if one that it displaced is larger by more than the errors of both:
    5e-7 · |x| · |w| for the product, a rounding for adding the bias.
    """
    pre_acts, error = float32_errors(x, W, bias)
    pre_acts = pre_acts.abs() if magnitude else pre_acts
    best = pre_acts.topk(indices.shape[1], dim=1).indices
    is_picked = torch.zeros_like(pre_acts, dtype=torch.bool).scatter_(1, indices, True)
    is_best = torch.zeros_like(is_picked).scatter_(1, best, True)
    displaced = torch.where(is_best & ~is_picked, pre_acts - error, -torch.inf).max(1, keepdim=True).values
    outside = is_picked & ~is_best
    wrong = outside & (pre_acts + error < displaced)
    return int(wrong.sum()), int(outside.sum() - wrong.sum())


def float32_errors(x: Tensor, W: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Return pre-activations in float64, and by how much those in float32 may differ."""
    x, W, bias = x.double(), W.double(), bias.double()
    pre_acts = x @ W.T + bias
    return pre_acts, 5e-7 * x.norm(dim=1, keepdim=True) * W.norm(dim=1) + 6e-8 * (pre_acts.abs() + bias.abs()) + 1e-43


def is_picked(latents: Tensor, starts: Tensor, n: int) -> Tensor:
    """Return [B, n], what a selection over a batch holds; it must be in order, without repeats."""
    counts = starts.long().diff()
    tokens = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
    places = tokens * n + latents[: len(tokens)].long()
    assert bool((places.diff() > 0).all())
    assert bool((latents[len(tokens) :] == n).all())
    picked = torch.zeros(len(counts) * n, dtype=torch.bool, device=counts.device)
    picked[places] = True
    return picked.view(-1, n)


def batch_mistakes(x: Tensor, W: Tensor, bias: Tensor, picked: Tensor) -> int:
    """Count the wrong picks of the largest of a whole batch, as `selection_mistakes` does for each token."""
    pre_acts, error = float32_errors(x, W, bias)
    best = torch.zeros_like(picked.flatten())
    best[pre_acts.flatten().topk(int(picked.sum())).indices] = True
    best = best.view_as(picked)
    displaced = torch.where(best & ~picked, pre_acts - error, -torch.inf).max()
    return int((picked & ~best & (pre_acts + error < displaced)).sum())
