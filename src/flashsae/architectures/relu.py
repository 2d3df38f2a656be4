"""ReLU: all latents with a pre-activation above 0, which a penalty on activations keeps few.

    acts  = relu((x − b_dec) @ W_enc + b_enc)
    x_hat = acts @ W_dec + b_dec
    loss  = ‖x − x_hat‖² + λ Σ acts · ‖rows of W_dec‖,   means over tokens

That is the SAE of Bricken et al. 2023 with the penalty of Anthropic's update of April 2024. With the norms in it,
nothing is gained by small activations along long rows, so rows are left free there. Here they have norm 1: every SAE of
theirs is one of these, with acts · ‖row‖ in the place of acts, the same x_hat and the same loss, in which the norms are
1. λ rises linearly from 0 over the first steps, as it does there.

With p-annealing (Karvonen et al. 2024) acts**p takes the place of acts, p falling from 1: closer to counting what is
active. The paper changes λ from step to step so that the penalty stays as large as it was; here its value in each batch
is that of the L1 norm, and only its slopes are those of acts**p. These have no bound near 0, so it is (acts + small)**p
− small**p, with small a thousandth of the standard deviation of a token: the slope at 0 is p · small**(p − 1).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import flashsae
from flashsae.architecture import AUTOENCODER, AUXK, RECONSTRUCTION, Architecture, Progress, Term
from flashsae.settings.kinds import Fraction, NonNegativeFloat, NonNegativeInt, Range, check_fields

if TYPE_CHECKING:
    from torch import Tensor

SMALL = 1e-3
"""Of the standard deviation of a token: below about so much the slope of the p-norm rises no further."""


@dataclass(frozen=True)
class ReLUSettings:
    """Settings of ReLU.

    Args:
        l1: Weight of the penalty Σ activations / standard deviation of a token, beside the FVU, so without a unit. More
            gives fewer active latents: try 0.1, and go on by factors of 2. A loss ‖x − x_hat‖² + λ Σ activations, of
            activations scaled to a variance V of a token, has l1 = λ / √V: Anthropic's λ of 5, with norms of √d_in, is
            0.18 at d_in 768.
        l1_warmup: First fraction of the steps, in which the weight rises linearly from 0.
        p_end: Exponent of the activations in the penalty at the last step, to which it falls linearly from 1. 1 leaves
            it at that, the L1 norm; Karvonen et al. go to 0.2.
        p_start: Fraction of the steps from which on it falls.
        resample_every_steps: Steps between two resamplings, at which dead latents start again as tokens that are
            explained worst (Bricken et al. 2023); 0 turns it off.
    """

    l1: NonNegativeFloat = 0.1
    l1_warmup: Fraction = 0.05
    p_end: Annotated[float, Range("a number above 0, 1 at most", lambda p: 0 < p <= 1)] = 1.0
    p_start: Fraction = 0.5
    resample_every_steps: NonNegativeInt = 0

    def __post_init__(self) -> None:
        check_fields(self)


def encode(sae: Any, x: Tensor) -> Any:
    """Return relu((x − b_dec) @ W_enc + b_enc)."""
    code: Any = flashsae.ops.encode_above(
        x, sae.W_enc_T, sae.b_enc, 0.0, b_dec=sae.b_pre, capacity=sae.capacity, precision=sae.precision,
        **sae.memory(x),
    )  # fmt: skip
    return code.replace(code.acts.relu())


def schedule(config: flashsae.SAEConfig, progress: Progress) -> Mapping[str, float]:
    """Return what the weight of the penalty is multiplied by, and the exponent where it changes."""
    settings, done = config.arch, progress.fraction
    ramp = {"ramp": min(1.0, done / settings.l1_warmup) if settings.l1_warmup else 1.0}
    if settings.p_end == 1.0:
        return ramp
    fallen = max(0.0, done - settings.p_start) / (1 - settings.p_start) if settings.p_start < 1 else float(done == 1)
    return {**ramp, "p": 1 + (settings.p_end - 1) * fallen}


def sparsity(step: flashsae.sae.Step) -> Tensor:
    """Return ramp · Σ acts / (tokens · √variance), or with an exponent what has the same value and other slopes."""
    acts = step.code.acts
    tokens = step.code.pattern.B
    unit = step.token_weights[0] * tokens  # 1 / variance
    total = acts.sum() * unit.sqrt() / tokens
    ramp, p = step.sae.now["ramp"].to(total.dtype), step.sae.now.get("p")
    if p is None:
        return ramp * total
    # plus SMALL, so that the slope at 0 is finite, and 0 where an activation is 0
    powers = (((acts * unit.sqrt() + SMALL) ** p) - SMALL**p).sum() / tokens
    return ramp * powers * (total / powers.clamp_min(1e-30)).detach()


SPARSITY = Term(
    "sparsity",
    "ramp · Σ acts / (tokens · √variance of a token)",
    "Sum of the activations of a token, relative to the standard deviation of a token: what l1 weighs.",
    sparsity,
    weight="l1",
)

ARCHITECTURE = Architecture(
    name="relu",
    title="ReLU",
    settings=ReLUSettings,
    parameters=AUTOENCODER,
    encode=encode,
    terms=(RECONSTRUCTION, SPARSITY, AUXK),
    l0=lambda settings: 64.0,
    schedule=schedule,
    varies=True,
    each_by_itself=True,
    weighs=("sparsity",),
    defaults={"auxk_alpha": 0.0},
    source="Bricken et al. 2023; Anthropic's update of April 2024; p-annealing: Karvonen et al. 2024",
)
