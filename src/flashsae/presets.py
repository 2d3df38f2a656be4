"""Recipes of publications, as settings of ours."""

from __future__ import annotations

import math
from typing import Any

from flashsae.settings.training import TrainConfig

_BATCH = 4096


def gemma_scope_2(target_l0: float, *, tokens: int, **settings: Any) -> TrainConfig:
    """Return the recipe of the JumpReLU SAEs of Gemma Scope 2.

        fit(x, config=gemma_scope_2(50, tokens=400_000_000, d_sae=16384))

    Adam with betas 0 and 0.999, eps 1e-8 and lr 7e-5, which rises as a cosine from a tenth over 1000 steps and stays;
    batches of 4096 tokens of mean square 1; bandwidth and initial thresholds of 0.001 of their root mean square norm;
    the quadratic penalty towards the target, which rises over 50,000 steps, or half of them where there are fewer than
    twice as many. No AuxK.

    The frequency penalty of the report has no published weight: give frequency_weight where it is wanted. Ours, and not
    of the report, are the least-squares length that W_enc starts with, and the control that brings L0 to its target and
    holds it there: threshold_control=0 leaves that to the penalty, which takes a hundred thousand steps at this lr.
    multiplier_gain=0.5 lets the penalty hold it more exactly, as it is by default outside this recipe.

    Args:
        target_l0: latents active for each token.
        tokens: tokens to train on. The recipe is one of billions: shorter runs explain more with the lr of ours.
        settings: others, or in place of those here.
    Raises:
        ConfigError: a setting has another type than it declares, or is out of its range.
    Source: Gemma Scope 2 report, section 3.2.
    """
    batch_tokens = settings.get("batch_tokens", min(_BATCH, tokens))
    steps = max(1, math.ceil(tokens / batch_tokens))
    recipe = {
        "arch": "jump_relu",
        "target_l0": target_l0,
        "penalty": "quadratic",
        "bandwidth": 1e-3,
        "initial_threshold": 1e-3,
        "multiplier_gain": 0.0,
        "sparsity_warmup": min(0.5, 50_000 / steps),
        "tokens": tokens,
        "batch_tokens": batch_tokens,
        "normalize_activations": "mean_square",
        "lr": 7e-5,
        "betas": (0.0, 0.999),
        "eps": 1e-8,
        "warmup": "cosine",
        "warmup_start": 0.1,
        "warmup_steps": min(1000, steps),
        "decay_fraction": 0.0,
        "auxk_alpha": 0.0,
    }
    return TrainConfig(**{**recipe, **settings})
