"""What a training run is made of, as typed, frozen, checked settings. `None` means: worked out from the others."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Literal

from flashsae.errors import ConfigError
from flashsae.precision import Precision
from flashsae.settings.kinds import (
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    check_fields,
)


def default_lr(d_sae: int) -> float:
    """Return a learning rate for batches of some thousand tokens: 8e-4 at 16384 latents, falling as 1 / sqrt(d_sae).

    Source: the exponent is that of Gao et al. 2024, section 3; the constant is ours, measured on runs of a million
        tokens (LOG.md). Runs of a billion tokens, or far larger batches, do well with a quarter of it.
    """
    return 8e-4 / math.sqrt(d_sae / 2**14)


@dataclass(frozen=True)
class TrainConfig:
    """Settings of the SAE and its training.

    Args:
        d_sae: Number of latents. Default: the next power of two from 8 x d_in.
        k: Latents active for each token.
        tokens: Tokens to train on, repeats counted.
        batch_tokens: Tokens in a step; no more than tokens.
        precision: Of products on a GPU: float32 (certified: the latents chosen are those of float32 arithmetic), tf32,
            or bf16 (fastest: weights are kept in two halves of 16 bits, and no bit of them is lost).
        moments: float32, or bf16: half the memory of Adam's moments, rounded stochastically. Approximate.
        lr: Peak learning rate of Adam. Default: 8e-4 / sqrt(d_sae / 16384).
        warmup_steps: Steps of linear rise of the learning rate; no more than there are. Default: 5 % of the steps, 1000
            at most.
        decay_fraction: Last fraction of the steps, in which the learning rate falls linearly to 0. Where it overlaps
            the rise, the lower of both holds.
        clip_norm: Largest global norm of the gradient. Default: no clipping.
        auxk_alpha: Weight of the auxiliary loss that revives dead latents; 0 turns it off.
        k_aux: Dead latents that the auxiliary loss uses for each token. Default: d_in / 2, 1024 and d_sae at most.
        dead_after_tokens: A latent is dead when no token of this many gave it a value above 0; with more than tokens
            none ever is. Default: tokens / 10, 10 million at most.
        shuffle_tokens: Tokens that are mixed with each other, at least two batches; bounds the memory of the shuffle. A
            stream fills a buffer of so many before the first step, or of all tokens if there are fewer.
        seed: Of the initial weights and of the order of the data.
        log_every_steps: Steps between two lines of the log.
        evaluate_every_steps: Steps between two measurements on held-out tokens. Default: about 20 in a run.
        checkpoint_every_steps: Steps between two checkpoints.
        device: auto, cpu, cuda, cuda:1 ...
    """

    d_sae: PositiveInt | None = None
    k: PositiveInt = 32
    tokens: PositiveInt = 1_500_000
    batch_tokens: PositiveInt = 1024
    precision: Precision = "float32"
    moments: Literal["float32", "bf16"] = "float32"
    lr: PositiveFloat | None = None
    warmup_steps: NonNegativeInt | None = None
    decay_fraction: Fraction = 0.2
    clip_norm: PositiveFloat | None = None
    auxk_alpha: NonNegativeFloat = 1 / 32
    k_aux: PositiveInt | None = None
    dead_after_tokens: PositiveInt | None = None
    shuffle_tokens: PositiveInt = 1 << 18
    seed: NonNegativeInt = 0
    log_every_steps: PositiveInt = 10
    evaluate_every_steps: PositiveInt | None = None
    checkpoint_every_steps: PositiveInt = 250
    device: str = "auto"

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def steps(self) -> int:
        """Steps of the whole training."""
        return -(-self.tokens // self.batch_tokens)

    def resolve(self, d_in: int) -> ResolvedConfig:
        """Fill in what was left to be worked out.

        Args:
            d_in: width of the activations.
        Raises:
            ConfigError: k or k_aux > d_sae, batch_tokens > tokens, or warmup_steps > steps.
        """
        d_sae = self.d_sae or 1 << (8 * d_in - 1).bit_length()
        for name, most, what in (
            ("k", d_sae, "d_sae"),
            ("k_aux", d_sae, "d_sae"),
            ("batch_tokens", self.tokens, "tokens"),
            ("warmup_steps", self.steps, "the steps of this training"),
        ):
            value = getattr(self, name)
            if value is not None and value > most:
                raise ConfigError(f"{name}: expected {name} <= {what} = {most}, got {value}.")
        worked_out = {
            "d_in": d_in,
            "d_sae": d_sae,
            "lr": default_lr(d_sae),
            "warmup_steps": min(1000, self.steps // 20),
            "k_aux": min(1024, max(1, d_in // 2), d_sae),
            "dead_after_tokens": min(10_000_000, max(1, self.tokens // 10)),
            "evaluate_every_steps": max(1, self.steps // 20),
        }
        given = {name: value for name, value in asdict(self).items() if value is not None}
        return ResolvedConfig(**{**worked_out, **given})


@dataclass(frozen=True)
class ResolvedConfig(TrainConfig):
    """A `TrainConfig` of which every setting has its value, with the width that it was worked out for."""

    d_in: int = 0
    d_sae: int = 0
    lr: float = 0.0
    warmup_steps: int = 0
    k_aux: int = 0
    dead_after_tokens: int = 0
    evaluate_every_steps: int = 0
