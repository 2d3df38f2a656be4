"""What a training run is made of, as typed, frozen, checked settings. `None` means: worked out from the others."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Literal, get_args

from flashsae.errors import ConfigError
from flashsae.ops.validate import Precision
from flashsae.optim import default_lr


@dataclass(frozen=True)
class TrainConfig:
    """Settings of the SAE and its training.

    Args:
        d_sae: Number of latents. Default: the next power of two from 8 x d_in.
        k: Latents active for each token.
        tokens: Tokens to train on, repeats counted.
        batch_tokens: Tokens in a step.
        precision: Of products on a GPU: float32 (certified: the latents chosen are those of float32 arithmetic), tf32,
            or bf16 (fastest: weights are kept in two halves of 16 bits, and no bit of them is lost).
        moments: float32, or bf16: half the memory of Adam's moments, rounded stochastically. Approximate.
        lr: Peak learning rate of Adam. Default: 8e-4 / sqrt(d_sae / 16384).
        warmup_steps: Steps of linear rise of the learning rate. Default: 5 % of the steps, 1000 at most.
        decay_fraction: Last fraction of the steps, in which the learning rate falls linearly to 0.
        clip_norm: Largest global norm of the gradient. Default: no clipping.
        auxk_alpha: Weight of the auxiliary loss that revives dead latents; 0 turns it off.
        k_aux: Dead latents that the auxiliary loss uses for each token. Default: d_in / 2, 1024 at most.
        dead_after_tokens: A latent is dead when no token of this many gave it a value above 0. Default: tokens
            / 10, 10 million at most.
        shuffle_tokens: Tokens that are mixed with each other; bounds the memory of the shuffle.
        seed: Of the initial weights and of the order of the data.
        log_every_steps: Steps between two lines of the log.
        evaluate_every_steps: Steps between two measurements on held-out tokens. Default: about 20 in a run.
        checkpoint_every_steps: Steps between two checkpoints.
        device: auto, cpu, cuda, cuda:1 ...
    """

    d_sae: int | None = None
    k: int = 32
    tokens: int = 1_500_000
    batch_tokens: int = 1024
    precision: Precision = "float32"
    moments: Literal["float32", "bf16"] = "float32"
    lr: float | None = None
    warmup_steps: int | None = None
    decay_fraction: float = 0.2
    clip_norm: float | None = None
    auxk_alpha: float = 1 / 32
    k_aux: int | None = None
    dead_after_tokens: int | None = None
    shuffle_tokens: int = 1 << 18
    seed: int = 0
    log_every_steps: int = 10
    evaluate_every_steps: int | None = None
    checkpoint_every_steps: int = 250
    device: str = "auto"

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in _CHOICES and value not in _CHOICES[field.name]:
                raise ConfigError(f"{field.name}: expected one of {', '.join(_CHOICES[field.name])}, got {value!r}.")
            if value is None or isinstance(field.default, str):
                continue
            is_float = "float" in str(field.type)
            if isinstance(value, bool) or not isinstance(value, (int, float) if is_float else int):
                kind = "a number" if is_float else "an int, such as 1_000_000"
                raise ConfigError(f"{field.name}: expected {kind}, got {value!r}.")
            if not _in_range(field.name, value):
                raise ConfigError(f"{field.name}: expected {_expected(field.name)}, got {value!r}.")

    @property
    def steps(self) -> int:
        """Steps of the whole training."""
        return -(-self.tokens // self.batch_tokens)

    def resolve(self, d_in: int) -> ResolvedConfig:
        """Fill in what was left to be worked out.

        Args:
            d_in: width of the activations.
        Raises:
            ConfigError: k > d_sae.
        """
        d_sae = self.d_sae or 1 << (8 * d_in - 1).bit_length()
        if self.k > d_sae:
            raise ConfigError(f"k: expected k <= d_sae = {d_sae}, got {self.k}.")
        worked_out = {
            "d_in": d_in,
            "d_sae": d_sae,
            "lr": default_lr(d_sae),
            "warmup_steps": min(1000, self.steps // 20),
            "k_aux": min(1024, max(1, d_in // 2)),
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


_CHOICES = {"precision": get_args(Precision), "moments": ("float32", "bf16")}
_POSITIVE = {
    "d_sae",
    "k",
    "tokens",
    "batch_tokens",
    "lr",
    "clip_norm",
    "k_aux",
    "dead_after_tokens",
    "shuffle_tokens",
    "log_every_steps",
    "evaluate_every_steps",
    "checkpoint_every_steps",
}
_FRACTION = {"decay_fraction"}
_NOT_NEGATIVE = {"warmup_steps", "auxk_alpha", "seed"}


def _in_range(name: str, value: float) -> bool:
    if name in _POSITIVE:
        return 0 < value < float("inf")
    if name in _FRACTION:
        return 0 <= value <= 1
    return 0 <= value < 2**63 if name in _NOT_NEGATIVE else True


def _expected(name: str) -> str:
    if name in _FRACTION:
        return "a fraction from 0 to 1"
    return "a positive number" if name in _POSITIVE else "a number that is not negative"
