"""The learning rate: its default, and how it changes while training."""

from __future__ import annotations

import math

from flashsae.settings.training import TrainConfig
from flashsae.settings.training import default_lr as default_lr


def lr_factor(
    step: int, steps: int, warmup_steps: int, decay_steps: int, *, warmup: str = "linear", start: float = 0.0
) -> float:
    """Return the factor of the learning rate at a step: up, constant, linear down to almost 0.

        rise = start + (1 - start) · t, t = (step + 1) / warmup_steps; with "cosine" (1 - cos πt) / 2 in place of t

    Args:
        step: from 0.
        steps: of the whole training.
        warmup_steps: steps of the rise, the last of which has the factor 1.
        decay_steps: steps of the fall; the last step has 1 / decay_steps.
        warmup: linear or cosine.
        start: what the rise begins above.
    """
    rise = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    if warmup == "cosine":
        rise = (1 - math.cos(math.pi * rise)) / 2
    decay = (steps - step) / decay_steps if decay_steps else 1.0
    return min(1.0, start + (1 - start) * rise, decay)


def learning_rate(step: int, config: TrainConfig) -> float:
    """Return the learning rate of a step, counted from 0, of a training with these settings, which are filled.

    In an extension it rises and falls as in a training of its own; where it did not fall before, it does not rise.
    """
    begin, end = config.stage(step)
    steps, is_constant = end - begin, begin > 0 and config.decay_fraction == 0
    decay_steps = round(config.decay_fraction * steps)
    warmup_steps = 0 if is_constant else min(config.warmup_steps, steps)
    factor = lr_factor(step - begin, steps, warmup_steps, decay_steps, warmup=config.warmup, start=config.warmup_start)
    return config.lr * factor
