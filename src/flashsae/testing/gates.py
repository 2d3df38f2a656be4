"""Dense oracles of SAEs that learn which latents are active: by thresholds, or by a gate."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from flashsae.testing.oracles import (
    ORACLES,
    DenseStep,
    Oracle,
    Params,
    dense_decode,
    dense_pre_acts,
    dense_reconstruction,
)


def straight_through(value: Tensor, slope: Tensor, of: Tensor) -> Tensor:
    """Return a value that changes with `of` as if it were slope · of."""
    return value + slope.detach() * (of - of.detach())


def dense_window(pre_acts: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """Return K / bandwidth: 1 / bandwidth where |z − threshold| < bandwidth / 2, and 0 elsewhere."""
    is_inside = (pre_acts > threshold - bandwidth / 2) & (pre_acts < threshold + bandwidth / 2)
    return is_inside.to(pre_acts.dtype) / bandwidth


def dense_step(pre_acts: Tensor, threshold: Tensor, bandwidth: float, *, ste_to_input: bool = False) -> Tensor:
    """Return H(z − threshold), with its straight-through gradient."""
    window = dense_window(pre_acts, threshold, bandwidth)
    found = straight_through((pre_acts > threshold).to(pre_acts.dtype), -window, threshold)
    return straight_through(found, window, pre_acts) if ste_to_input else found


def dense_jump_relu(
    x: Tensor, W_enc_T: Tensor, b_enc: Tensor, b_dec: Tensor | None = None, *, threshold: Tensor, bandwidth: float,
    unit: float = 1.0, ste_to_input: bool = False,
) -> Tensor:  # fmt: skip
    """Return latent_acts, [B, d_sae], of a JumpReLU SAE: z · H(z − threshold), with its straight-through gradient.

    Args:
        x, W_enc_T, b_enc, b_dec: as of `dense_topk`.
        threshold: [d_sae].
        bandwidth: of the window, in units of `unit`.
        unit: root mean square distance of a token from the mean.
        ste_to_input: whether pre-activations have the gradient of the jump, too.
    Source: Rajamanoharan et al. 2024, sections 3 and 4.
    """
    pre_acts = dense_pre_acts(x, W_enc_T, b_enc, b_dec)
    slope = threshold * dense_window(pre_acts, threshold, bandwidth * unit)
    found = straight_through(pre_acts * (pre_acts > threshold), -slope, threshold)
    return straight_through(found, slope, pre_acts) if ste_to_input else found


def dense_pre_act_loss(x: Tensor, params: Params, dead: Tensor, unit: float = 1.0) -> Tensor:
    """Return the mean over tokens of Σ over dead latents, [d_sae] bool, of relu(threshold − z) / unit."""
    pre_acts = dense_pre_acts(x, params["W_enc_T"], params["b_enc"], params.get("b_dec"))
    return (params["threshold"] - pre_acts).relu()[:, dead].sum() / (len(x) * unit)


def _active(step: DenseStep) -> Tensor:
    settings: Any = step.settings
    bandwidth = settings.bandwidth * getattr(settings, "unit", 1.0)
    return dense_step(step.pre_acts, step.encoder["threshold"], bandwidth, ste_to_input=settings.ste_to_input)


def _ramp(step: DenseStep) -> float:
    ramp: float = getattr(step.settings, "ramp", 1.0)
    return ramp


def dense_quadratic(step: DenseStep) -> Tensor | None:
    """Return 2 / target_l0 · (L0 − target_l0)², with the slopes of an L0 that is larger by multiplier · target_l0."""
    if step.settings.penalty != "quadratic":
        return None
    target: float = step.settings.target_l0
    l0, multiplier = _active(step).sum(1).mean(), getattr(step.settings, "multiplier", 0.0)
    return _ramp(step) * (2 / target * (l0 - target) ** 2 + 4 * multiplier * (l0 - l0.detach()))


def dense_l0(step: DenseStep) -> Tensor | None:
    """Return L0."""
    return _ramp(step) * _active(step).sum(1).mean() if step.settings.penalty == "l0" else None


def dense_tanh(step: DenseStep) -> Tensor | None:
    """Return the mean over tokens of Σ tanh(tanh_scale · acts), acts in units of unit / √d_in."""
    if step.settings.penalty != "tanh":
        return None
    scale: float = step.settings.tanh_scale * step.x.shape[1] ** 0.5 / getattr(step.settings, "unit", 1.0)
    return _ramp(step) * (step.latent_acts * scale).tanh().sum(1).mean()


def dense_frequency(step: DenseStep) -> Tensor:
    """Return Σ over latents of frequency² / frequency_scale."""
    frequencies = _active(step).mean(0)
    return _ramp(step) / float(step.settings.frequency_scale) * frequencies.square().sum()


def dense_gated(
    x: Tensor, W_enc_T: Tensor, b_enc: Tensor, b_dec: Tensor | None = None, *, r_mag: Tensor, b_mag: Tensor
) -> Tensor:
    """Return latent_acts, [B, d_sae], of a Gated SAE: the magnitudes of latents whose gate is above 0.

    Args:
        x, W_enc_T, b_enc, b_dec: as of `dense_topk`; b_enc is the bias of the gate.
        r_mag, b_mag: [d_sae].
    Source: Rajamanoharan et al. 2024, "Improving dictionary learning with gated sparse autoencoders", section 3.
    """
    raw = dense_pre_acts(x, W_enc_T, b_enc * 0, b_dec)
    is_open = (raw + b_enc > 0).to(raw.dtype)
    return is_open * (r_mag.exp() * raw + b_mag).relu()


def dense_gate_sparsity(step: DenseStep) -> Tensor:
    """Return the mean over tokens of Σ relu(gate) / √variance."""
    return _ramp(step) * step.pre_acts.relu().sum(1).mean() / math.sqrt(step.variance)


def dense_gate_fvu(step: DenseStep) -> Tensor:
    """Return the FVU of relu(gate) @ W_dec + b_dec, with a decoder that has no gradient."""
    frozen = {name: value.detach() for name, value in step.params.items()}
    return step.fvu(dense_decode(step.pre_acts.relu(), frozen))


ORACLES["jump_relu"] = Oracle(
    dense_jump_relu,
    params=("W_enc_T", "b_enc", "b_dec", "threshold"),
    terms={
        "fvu": dense_reconstruction,
        "quadratic_penalty": dense_quadratic,
        "l0_penalty": dense_l0,
        "tanh_penalty": dense_tanh,
        "frequency_penalty": dense_frequency,
    },
)
ORACLES["gated"] = Oracle(
    dense_gated,
    params=("W_enc_T", "b_enc", "b_dec", "r_mag", "b_mag"),
    terms={"fvu": dense_reconstruction, "gate_sparsity": dense_gate_sparsity, "gate_fvu": dense_gate_fvu},
)
