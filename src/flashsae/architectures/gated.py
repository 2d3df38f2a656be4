"""Gated: one row of the encoder a latent, and two biases: a gate says whether it is active, a magnitude how much.

    raw = (x − b_dec) @ W_enc
    gate = raw + b_enc
    magnitude = relu(exp(r_mag) · raw + b_mag)
    acts = H(gate) · magnitude                       H(u) = 1 for u > 0, else 0
    x_hat = acts @ W_dec + b_dec
    loss = FVU(x_hat) + l1 · ramp · mean over tokens of Σ relu(gate) / √variance
           + FVU(relu(gate) @ frozen(W_dec) + frozen(b_dec)) + auxk_alpha · AuxK

where the FVU is Σ‖x − x_hat‖² / (tokens · variance). H has no gradient: the gate learns from the last two alone, and
frozen parameters have none from there. Rows of W_dec have norm 1, so that of the paper's weighting of the gate is left
out. A paper whose loss is ‖x − x_hat‖² + λ Σ relu(gate), for activations scaled to a variance V, has l1 = λ / √V.

Selected are the raw values that exceed −b_enc: a sum is above 0 exactly where they do. A step takes the passes of a
TopK step over as many entries, and a second decode pass over the same rows, forward and backward for the values; the
weights of the decoder have no second gradient. Of each latent three sums more are taken: for b_enc, r_mag and b_mag.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import flashsae
from flashsae.architecture import AUTOENCODER, AUXK, RECONSTRUCTION, Architecture, Parameter, Progress, Term
from flashsae.settings.kinds import Fraction, NonNegativeFloat, check_fields

if TYPE_CHECKING:
    from torch import Tensor

    from flashsae.sae.step import Step


@dataclass(frozen=True)
class GatedSettings:
    """Settings of Gated.

    Args:
        l1: Weight of the penalty Σ relu(gate) / standard deviation of a token, beside the FVU, so without a unit: more
            gives fewer active latents.
        l1_warmup: First fraction of the training, in which the weight rises linearly from 0.
    """

    l1: NonNegativeFloat = 0.2
    l1_warmup: Fraction = 0.05

    def __post_init__(self) -> None:
        check_fields(self)


def encode(sae: Any, x: Tensor) -> Any:
    """Return the magnitudes of all latents whose gate is open."""
    code = flashsae.ops.encode_above(
        x, sae.W_enc_T, sae.b_enc.new_zeros(sae.b_enc.shape), -sae.b_enc.detach(),
        b_dec=sae.b_pre, capacity=sae.capacity, precision=sae.precision, **sae.memory(x),
    )  # fmt: skip
    raw, of_latent = code.acts, flashsae.ops.per_latent
    factors, biases = of_latent(sae.r_mag.exp(), code.pattern), of_latent(sae.b_mag, code.pattern)
    is_closed = raw <= of_latent(-sae.b_enc.detach(), code.pattern)
    return code.replace((raw * factors + biases).relu().masked_fill(is_closed, 0.0))


def _gate(step: Step) -> Tensor:
    """Return relu(gate) of every entry of the code."""
    raw = step.code.pre_acts
    assert raw is not None
    return (raw + flashsae.ops.per_latent(step.sae.b_enc, step.code.pattern)).relu()


def gate_sparsity(step: Step) -> Tensor:
    """Return ramp · mean over tokens of Σ relu(gate) / √variance."""
    B, gate = step.code.pattern.B, _gate(step)
    if B == 0:
        return gate.sum()
    deviation = (step.token_weights[0] * B).rsqrt()
    return step.sae.now["ramp"].to(gate.dtype) * (gate.sum() / (B * deviation.to(gate.dtype)))


def gate_fvu(step: Step) -> Tensor:
    """Return the FVU of what the gate alone reconstructs, with a decoder that learns nothing from it."""
    sae, direct = step.sae, step.sae.architecture.direct
    target = step.target if direct is None else step.target - direct(sae, step.x).detach()
    loss: Tensor = flashsae.ops.decode_loss(
        step.code.replace(_gate(step)), sae.W_dec.detach(), sae.b_dec.detach(), target,
        token_weights=step.token_weights, precision=sae.precision,
    ).loss  # fmt: skip
    return loss


def recenter(sae: flashsae.SAE, moved: Tensor) -> None:
    """Let both biases take over what raw values lose where the encoder sees x less a vector [d_in]."""
    lost = flashsae.sae.products(sae.W_enc_T, moved)
    sae.b_enc.add_(lost)
    sae.b_mag.add_(sae.r_mag.double().exp() * lost)


def schedule(config: flashsae.SAEConfig, progress: Progress) -> dict[str, float]:
    """Return what the weight of the penalty is multiplied by."""
    warmup = config.arch.l1_warmup
    return {"ramp": min(1.0, progress.fraction / warmup) if warmup else 1.0}


ARCHITECTURE = Architecture(
    name="gated",
    title="Gated",
    settings=GatedSettings,
    parameters=(
        *AUTOENCODER,
        Parameter("r_mag", ("d_sae",), "logarithm of what a magnitude is multiplied by"),
        Parameter("b_mag", ("d_sae",), "bias of the magnitude", power=1),
    ),
    encode=encode,
    terms=(
        RECONSTRUCTION,
        Term(
            "gate_sparsity",
            "ramp · mean over tokens of Σ relu(gate) / √variance of a token",
            "Sum of the gates of a token, relative to the standard deviation of a token: what l1 weighs.",
            gate_sparsity,
            weight="l1",
        ),
        Term(
            "gate_fvu",
            "FVU of relu(gate) @ frozen(W_dec) + frozen(b_dec)",
            "Fraction of the variance that gates alone leave unexplained, with a decoder that learns nothing from it.",
            gate_fvu,
        ),
        AUXK,
    ),
    l0=lambda settings: 64.0,
    recenter=recenter,
    schedule=schedule,
    varies=True,
    each_by_itself=True,
    defaults={"auxk_alpha": 0.0},
    source="Rajamanoharan et al. 2024, Improving dictionary learning with gated sparse autoencoders, section 3",
)
