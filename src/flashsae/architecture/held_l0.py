"""Thresholds and a penalty that bring L0 to a target and hold it there: what JumpReLU does behind each step.

The reconstruction pulls against a quadratic penalty, which answers only where L0 is off, so that it stays some per cent
too high. Two things go by the excess e = L0 / target_l0 − 1 of each batch, averaged over a twentieth of the steps so
far, between 10 and 1000:

    threshold ← threshold · (1 + threshold_control · e / steps)
    multiplier ← multiplier + multiplier_gain · e / steps,       slopes of the penalty those of
                                                                2 / target_l0 · (L0 − (1 − multiplier) · target_l0)²

The first is fast and keeps the proportions that thresholds learn. The second is a Lagrange multiplier, in the form that
Hestenes and Powell (1969) gave it: where it comes to rest L0 is the target, and what each threshold gains for the
reconstruction is what it costs in latents. Thresholds alone, driven against the reconstruction for long, would cost
latents their lives.

Source: a multiplier for a constraint on L0: Gallego-Posada et al. 2022, "Controlled sparsity via constrained
optimization". Averages of the thresholds, and both together, are ours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from flashsae.architecture.parts import Parameter, Progress

if TYPE_CHECKING:
    from torch import Tensor

    from flashsae.ops import SparseCode
    from flashsae.sae.module import SAE

STEPS = (0.05, 10, 1000)
"""That L0 is averaged over: a fraction of those done, no fewer and no more than these."""

_MOST = 1.0
"""The multiplier at most, of either sign: as if L0 were off by all of the target."""

_MISSED = 0.1
"""Of the target: what L0 is off by where it counts as missed."""

_LEAST_STEPS = 50
"""Of a training that is told to have missed it: in fewer nothing could bring L0 anywhere."""

MULTIPLIER = Parameter("multiplier", (), "by what L0 counts as larger, over its target", trained=False, saved=False)
MEAN_EXCESS = Parameter("mean_excess", (), "what L0 was above its target of late, over it", trained=False, saved=False)


def gains(progress: Progress, *, threshold_control: float, multiplier_gain: float) -> dict[str, float]:
    """Return what the schedule of an architecture has for `hold`, before a step: gains, and its share in averages.

    Args:
        progress: how far the training is.
        threshold_control, multiplier_gain: 0 while they are off.
    """
    fraction, least, most = STEPS
    steps = min(most, max(least, fraction * progress.step))
    return {
        "gain": min(1.0, threshold_control / steps),
        "multiplier_gain": min(1.0, multiplier_gain / steps),
        "share": 1 / min(steps, progress.step + 1),
    }


def shifted(sae: SAE, penalty: Tensor, l0: Tensor) -> Tensor:
    """Return the quadratic penalty of L0 with the slopes of an L0 that is larger by multiplier · target_l0."""
    multiplier: Tensor = sae.multiplier
    return penalty + 4 * multiplier * (l0 - l0.detach())


def hold(sae: SAE, code: SparseCode, target_l0: float) -> None:
    """Scale all thresholds, and move the multiplier, behind the step of a code."""
    dtype, now, B = sae.threshold.dtype, sae.now, code.pattern.B
    if B == 0:
        return
    excess = ((code.acts > 0).sum() / (B * target_l0) - 1).to(dtype)
    sae.mean_excess.lerp_(excess, now["share"].to(dtype))
    excess = excess.clamp(-0.5, 0.5)
    sae.threshold.mul_(1 + now["gain"].to(dtype) * excess)
    sae.multiplier.add_(now["multiplier_gain"].to(dtype) * excess).clamp_(-_MOST, _MOST)


def missed(sae: SAE, target_l0: float) -> str | None:
    """Return a sentence where the L0 that a training ends with is not the one that it aims at."""
    mean = sae.mean_excess.item()
    if abs(mean) <= _MISSED or sae.progress.steps < _LEAST_STEPS:
        return None
    advice = "a lower target_l0 or more latents" if mean < 0 else "a higher target_l0"
    return (
        f"the training ends with an L0 of {target_l0 * (1 + mean):.3g} on average of its last steps, {abs(mean):.0%} "
        f"{'below' if mean < 0 else 'above'} the target_l0 of {target_l0:g}: give it more steps or a higher lr, or "
        f"{advice}."
    )
