"""JumpReLU: every pre-activation above a threshold that its latent learns, in the forms that were published.

    z = (x − b_dec) @ W_enc + b_enc
    acts = JumpReLU(z) = z · H(z − threshold),        H(u) = 1 for u > 0, else 0
    x_hat = acts @ W_dec + b_dec
    loss = FVU + ramp · (sparsity_weight · penalty + frequency_weight · frequency penalty)
           + pre_act_weight · pre-activation loss + auxk_alpha · AuxK

The FVU is Σ‖x − x_hat‖² / (tokens · variance): a weight λ beside the mean of ‖x − x_hat‖² is λ / variance here, the
same number for activations whose mean squared norm is 1. With p_i the fraction of the tokens of a batch on which latent
i is active, and L0 = Σ_i p_i, the penalties are

    quadratic    2 / target_l0 · (L0 − target_l0)²                     Gemma Scope 2 report, section 3.2
    l0           L0                                                    Rajamanoharan et al. 2024, section 3
    tanh         mean over tokens of Σ_i tanh(tanh_scale · acts_i)     Anthropic, January 2025
    frequency    Σ_i p_i² / frequency_scale                            Smith et al. 2025 (GDM progress update 2)
    pre-acts     mean over tokens of Σ_{dead i} relu(threshold_i − z_i)      Anthropic, January 2025; of dead latents
                                                                       alone, as SAELens has it

Rows of W_dec have norm 1, so the norms that weight the tanh and the pre-activations are left out. The gradient of the
threshold is a straight-through estimate with a rectangular kernel (`flashsae.sae.jump_relu`): it comes from the entries
in the window |z − threshold| < bandwidth / 2 alone. In training the code holds these, too, those below their threshold
with the value 0; nothing else of the batch is looked at.

Units. Bandwidth and initial threshold are in units of `unit`, the root mean square distance of a token from the mean,
measured on the sample that a training begins with. So they do not depend on how activations are scaled, and are those
of activations of mean squared norm 1, as in Gemma Scope. Values in the tanh are in units of unit / √d_in, as for
activations of norm √d_in. A narrow window makes codes in training shorter; a wide one gives more thresholds a gradient
at each step, which short runs need. The threshold itself is trained and not its logarithm, which under Adam moves by
lr times itself at each step, too slow for a small one (SAELens and dictionary_learning found the same). It is kept
from falling below 0, and is divided as a bias is where activations come in another unit.

The target. Once the penalty quadratic has risen, `threshold_control` and `multiplier_gain` bring L0 to the target and
hold it there, by what `flashsae.architecture.held_l0` explains.

Start. Without an initial threshold all begin where target_l0 latents of a token of the sample exceed it, so that codes
are sparse from the first step. Recipes that begin with 0.001 begin with about half of the latents of a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import flashsae
from flashsae.architecture import AUTOENCODER, AUXK, RECONSTRUCTION, Architecture, Parameter, Progress, Term, held_l0
from flashsae.settings.kinds import AtMost, Fraction, NonNegativeFloat, PositiveFloat, check_fields

if TYPE_CHECKING:
    from torch import Tensor

    from flashsae.sae.step import Step

WEIGHTS = {"quadratic": 1.0, "l0": 2e-3, "tanh": 2e-3}
"""Default weight of each penalty."""

_DENSE_ELEMENTS = 1 << 28  # of codes in memory at once where a training may start with every latent active


@dataclass(frozen=True)
class JumpReLUSettings:
    """Settings of JumpReLU.

    Args:
        target_l0: Latents active for each token, on average: what the penalty quadratic aims at, and what a training
            begins with unless initial_threshold is given.
        penalty: quadratic, which aims at target_l0; l0, the number of active latents; or tanh of their values.
        sparsity_weight: Weight of the penalty beside the FVU. Default: 1 of quadratic, 0.002 of l0 and tanh.
        sparsity_warmup: First fraction of the training, in which penalties rise linearly from 0.
        bandwidth: Width of the window around a threshold from which it has its gradient, in units of the root mean
            square norm of activations.
        initial_threshold: In the same unit. Default: such that target_l0 latents exceed it.
        threshold_control: Gain of the control that scales all thresholds until L0 is target_l0 on average of late; with
            the penalty quadratic only. 0 leaves it to the penalty.
        multiplier_gain: Gain of the multiplier that shifts what the penalty quadratic aims at until L0 is target_l0. 0
            leaves it where it is.
        tanh_scale: Of the penalty tanh, for values in units of the root mean square of a coordinate.
        frequency_weight: Weight of the penalty on frequent latents.
        frequency_scale: Fraction of the tokens that a latent may be active on before this penalty is felt.
        pre_act_weight: Weight of the pre-activation loss, which revives dead latents.
        ste_to_input: Let encoder weights have the gradient of the jump, too, and not thresholds alone.
    """

    target_l0: Annotated[PositiveFloat, AtMost("d_sae")] = 32.0
    penalty: Literal["quadratic", "l0", "tanh"] = "quadratic"
    sparsity_weight: NonNegativeFloat | None = None
    sparsity_warmup: Fraction = 0.1
    bandwidth: PositiveFloat = 0.02
    initial_threshold: PositiveFloat | None = None
    threshold_control: NonNegativeFloat = 1.0
    multiplier_gain: NonNegativeFloat = 0.5
    tanh_scale: PositiveFloat = 4.0
    frequency_weight: NonNegativeFloat = 0.0
    frequency_scale: PositiveFloat = 0.1
    pre_act_weight: NonNegativeFloat = 0.0
    ste_to_input: bool = False

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def penalty_weight(self) -> float:
        """The weight of the penalty, also where it was left open."""
        return WEIGHTS[self.penalty] if self.sparsity_weight is None else self.sparsity_weight


def encode(sae: Any, x: Tensor) -> Any:
    """Return JumpReLU(z) of all z above their threshold; in training also those in the window below it, which are 0."""
    threshold, bandwidth = sae.threshold.detach(), _bandwidth(sae)
    code = flashsae.ops.encode_above(
        x, sae.W_enc_T, sae.b_enc, flashsae.sae.below_window(threshold, bandwidth) if sae.training else threshold,
        b_dec=sae.b_pre, capacity=sae.capacity, precision=sae.precision, **sae.memory(x),
    )  # fmt: skip
    thresholds = flashsae.ops.per_latent(sae.threshold, code.pattern)
    ste_to_input = sae.config.arch.ste_to_input
    return code.replace(flashsae.sae.jump_relu(code.acts, thresholds, bandwidth, ste_to_input=ste_to_input))


def _bandwidth(sae: Any) -> Tensor:
    bandwidth: Tensor = sae.unit * sae.config.arch.bandwidth
    return bandwidth


def _active(step: Step) -> Tensor:
    """Return H(z − threshold) of every entry of the code, differentiable by the threshold."""
    sae, code = step.sae, step.code
    assert code.pre_acts is not None
    thresholds = flashsae.ops.per_latent(sae.threshold, code.pattern)
    ste_to_input = sae.config.arch.ste_to_input
    return flashsae.sae.exceeds(code.pre_acts, thresholds, _bandwidth(sae), ste_to_input=ste_to_input)


def _ramped(step: Step, penalty: Tensor) -> Tensor:
    return penalty * step.sae.now["ramp"].to(penalty.dtype)


def quadratic_penalty(step: Step) -> Tensor | None:
    """Return 2 / target_l0 · (L0 − target_l0)², with slopes that the multiplier shifts."""
    arch = step.sae.config.arch
    if arch.penalty != "quadratic":
        return None
    l0 = _active(step).sum() / max(1, step.code.pattern.B)
    penalty = 2 / arch.target_l0 * (l0 - arch.target_l0).square()
    return _ramped(step, held_l0.shifted(step.sae, penalty, l0))


def l0_penalty(step: Step) -> Tensor | None:
    """Return L0."""
    if step.sae.config.arch.penalty != "l0":
        return None
    return _ramped(step, _active(step).sum() / max(1, step.code.pattern.B))


def tanh_penalty(step: Step) -> Tensor | None:
    """Return the mean over tokens of Σ_i tanh(tanh_scale · acts_i)."""
    sae, arch = step.sae, step.sae.config.arch
    if arch.penalty != "tanh":
        return None
    scale = arch.tanh_scale * sae.config.d_in**0.5 / sae.unit
    return _ramped(step, (step.code.acts * scale.to(step.code.acts.dtype)).tanh().sum() / max(1, step.code.pattern.B))


def frequency_penalty(step: Step) -> Tensor:
    """Return Σ_i p_i² / frequency_scale."""
    pattern = step.code.pattern
    frequencies = flashsae.ops.latent_sums(_active(step), pattern) / max(1, pattern.B)
    return _ramped(step, frequencies.square().sum() / step.sae.config.arch.frequency_scale)


def pre_act_loss(step: Step) -> Tensor | None:
    """Return the mean over tokens of Σ over dead latents of relu(threshold − z), in units of `unit`.

    Since relu(u) = u + relu(−u), it is Σ (threshold − z), which takes the mean of the tokens alone, and relu(z −
    threshold) of those that exceed it after all, which the code holds.
    """
    sae, code, dead = step.sae, step.code, step.dead
    if dead is None or code.pattern.B == 0:
        return None
    assert code.pre_acts is not None
    starts = dead.latents.new_zeros(2)
    starts[1:].copy_(dead.is_dead.sum())
    latents = dead.latents.masked_fill(~dead.is_dead, sae.config.d_sae)
    one = flashsae.ops.Pattern(latents.int(), sae.config.d_sae, starts.int())  # the dead latents of one token
    of_mean = flashsae.ops.pre_acts(
        step.x.mean(0, keepdim=True), sae.W_enc_T, sae.b_enc, one, b_dec=sae.b_pre, precision=sae.precision
    )
    missing = (flashsae.ops.per_latent(sae.threshold, one) - of_mean).sum()
    is_dead = flashsae.ops.per_latent((dead.slots >= 0).to(code.pre_acts.dtype), code.pattern)
    beyond = (code.pre_acts - flashsae.ops.per_latent(sae.threshold, code.pattern)).relu() * is_dead
    loss: Tensor = (missing + beyond.sum() / code.pattern.B) / sae.unit
    return loss


def schedule(config: flashsae.SAEConfig, progress: Progress) -> dict[str, float]:
    """Return how far penalties have risen, and the gains of what holds L0."""
    arch = config.arch
    ramp = min(1.0, progress.fraction / arch.sparsity_warmup) if arch.sparsity_warmup else 1.0
    names = ("threshold_control", "multiplier_gain")
    is_on = ramp == 1.0 and arch.penalty == "quadratic"
    return {"ramp": ramp, **held_l0.gains(progress, **{name: is_on * getattr(arch, name) for name in names})}


def start(sae: flashsae.SAE, x: Tensor, target: Tensor) -> None:
    """Set b_dec to the mean and W_enc to the best length, as any SAE starts; measure `unit`, and set the thresholds."""
    arch, d_sae = sae.config.arch, sae.config.d_sae
    sae.b_dec.copy_(target.double().mean(0))
    offset = x.double().mean(0) if sae.b_pre is None else sae.b_pre
    sae.unit.copy_((x.double() - offset).square().sum(1).mean().sqrt())
    if arch.initial_threshold is not None:
        sae.threshold.copy_((sae.unit * arch.initial_threshold).expand(d_sae))
        few = max(1, _DENSE_ELEMENTS // d_sae)
        flashsae.sae.initialize(sae, x[:few], target[:few])
        sae.b_dec.copy_(target.double().mean(0))
        return
    for last in (False, True):  # W_enc is scaled by what thresholds let through, and so are they
        k = min(d_sae, max(1, round(arch.target_l0)))
        code = flashsae.ops.encode_batch_topk(
            x, sae.W_enc_T, sae.b_enc, k, b_dec=sae.b_pre, precision=sae.precision, noise=sae.noise
        )
        sae.threshold.copy_(code.acts.amin().clamp_min(0.0).expand(d_sae))
        if not last:
            flashsae.sae.initialize(sae, x, target)


def control_l0(sae: flashsae.SAE, code: flashsae.SparseCode) -> None:
    """Hold L0 at its target, where there is one, and keep thresholds from falling below 0."""
    if sae.config.arch.penalty == "quadratic":
        held_l0.hold(sae, code, sae.config.arch.target_l0)
    sae.threshold.clamp_(min=0.0)


def verdict(sae: flashsae.SAE) -> str | None:
    """Return a sentence where a training has missed its target."""
    arch = sae.config.arch
    return held_l0.missed(sae, arch.target_l0) if arch.penalty == "quadratic" else None


ARCHITECTURE = Architecture(
    name="jump_relu",
    title="JumpReLU",
    settings=JumpReLUSettings,
    parameters=(
        *AUTOENCODER,
        Parameter("threshold", ("d_sae",), "what a pre-activation must exceed", 1e-3, power=1),
        Parameter("unit", (), "root mean square distance of a token from the mean", 1.0, power=1, trained=False),
        held_l0.MULTIPLIER,
        held_l0.MEAN_EXCESS,
    ),
    encode=encode,
    terms=(
        RECONSTRUCTION,
        Term(
            "quadratic_penalty",
            "2 / target_l0 · (L0 − target_l0)²",
            "How far the number of active latents of a batch is from its target, in a penalty that rises at the start.",
            quadratic_penalty,
            weight="penalty_weight",
        ),
        Term(
            "l0_penalty",
            "mean over tokens of the number of active latents",
            "Active latents of a token, in a penalty that rises at the start.",
            l0_penalty,
            weight="penalty_weight",
        ),
        Term(
            "tanh_penalty",
            "mean over tokens of Σ tanh(tanh_scale · acts)",
            "About the number of active latents of a token, where small values count less; rises at the start.",
            tanh_penalty,
            weight="penalty_weight",
        ),
        Term(
            "frequency_penalty",
            "Σ over latents of frequency² / frequency_scale",
            "What latents that are active on many tokens cost, beside the penalty on all.",
            frequency_penalty,
            weight="frequency_weight",
        ),
        Term(
            "pre_act_loss",
            "mean over tokens of Σ over dead latents of relu(threshold − z) / unit",
            "How far dead latents stay below their thresholds (Anthropic, January 2025).",
            pre_act_loss,
            weight="pre_act_weight",
            of_dead_latents=True,
        ),
        AUXK,
    ),
    l0=lambda settings: settings.target_l0,
    initialize=start,
    after_step=control_l0,
    verdict=verdict,
    schedule=schedule,
    varies=True,
    each_by_itself=True,
    weighs=("tanh_penalty",),
    source="Rajamanoharan et al. 2024, sections 3 and 4; Gemma Scope 2 report, section 3.2; Anthropic, January 2025",
)
