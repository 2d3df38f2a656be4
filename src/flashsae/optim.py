"""The learning-rate schedule and the optimiser's defaults."""

from __future__ import annotations

import math

import torch
from torch import nn

ADAM_BETAS = (0.9, 0.999)
ADAM_EPS = 6.25e-10
"""As in Gao et al. 2024. The loss is a fraction of variance, so gradients of rare latents are far below 1e-8."""


def default_lr(d_sae: int) -> float:
    """Return a learning rate for batches of some thousand tokens: 8e-4 at 16384 latents, falling as 1 / sqrt(d_sae).

    Source: the exponent is that of Gao et al. 2024, section 3; the constant is ours, measured on runs of a million
        tokens (LOG.md). Runs of a billion tokens, or far larger batches, do well with a quarter of it.
    """
    return 8e-4 / math.sqrt(d_sae / 2**14)


def lr_factor(step: int, steps: int, warmup_steps: int, decay_steps: int) -> float:
    """Return the factor of the learning rate at a step: linear up, constant, linear down to almost 0.

    Args:
        step: from 0.
        steps: of the whole training.
        warmup_steps: steps of the rise; the first step has 1 / warmup_steps.
        decay_steps: steps of the fall; the last step has 1 / decay_steps.
    """
    warmup = (step + 1) / warmup_steps if warmup_steps else 1.0
    decay = (steps - step) / decay_steps if decay_steps else 1.0
    return min(1.0, warmup, decay)


def build_adam(module: nn.Module, lr: float) -> torch.optim.Adam:
    """Return Adam over the parameters of a module, in PyTorch's fused form where it has one."""
    fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in module.parameters())
    return torch.optim.Adam(module.parameters(), lr=lr, betas=ADAM_BETAS, eps=ADAM_EPS, fused=fused)
