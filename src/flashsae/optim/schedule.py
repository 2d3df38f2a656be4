"""The learning rate: its default, and how it changes while training."""

from __future__ import annotations

from flashsae.settings.training import default_lr as default_lr


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
