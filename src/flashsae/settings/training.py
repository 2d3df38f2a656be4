"""What a training run is made of, as typed, frozen, checked settings. `None` means: worked out from the others."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from flashsae.architecture import Architecture, architecture_named, architecture_names, architecture_of, settings_of
from flashsae.architecture.sites import width_told
from flashsae.errors import ConfigError
from flashsae.precision import Precision
from flashsae.settings.elsewhere import near_setting, our_name
from flashsae.settings.kinds import (
    ABOVE_ZERO,
    DECAY,
    AtMost,
    Fraction,
    LeftOpen,
    Length,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    check_fields,
)
from flashsae.settings.left_open import check_bounds, fill, left_open, told
from flashsae.settings.normalization import Normalization, check_b_dec, check_normalization

DEFAULT_ARCH = "topk"
ADAM_BETAS = (0.9, 0.999)
ADAM_EPS = 6.25e-10
"""As in Gao et al. 2024. The loss is a fraction of variance, so gradients of rare latents are far below 1e-8."""

AuxK = Literal["gao", "sae_lens", "dictionary_learning", "sparsify"]
"""Whose formula of the auxiliary loss."""
BOTH = "init: expected no other start beside init_from, got data. Leave one of them out."

Config = TypeVar("Config", bound="TrainConfig")


def default_lr(d_sae: int) -> float:
    """Return a learning rate for batches of some thousand tokens: 8e-4 at 16384 latents, falling as 1 / sqrt(d_sae).

    Source: the exponent is that of Gao et al. 2024, section 3; the constant is ours, measured on runs of a million
        tokens (LOG.md). Runs of a billion tokens, or far larger batches, do well with a quarter of it.
    """
    return 8e-4 / math.sqrt(d_sae / 2**14)


def _flat(cls: type[Config]) -> type[Config]:
    """Let the settings of the architecture stand beside those of the training, as in TOML and on the command line."""
    made: Callable[..., None] = cls.__init__

    @functools.wraps(made)
    def init(self: Config, *positional: Any, **given: Any) -> None:
        known = {each.name for each in fields(cls)}
        own = {name: given.pop(name) for name in [name for name in given if name not in known]}
        if own:
            arch = given.get("arch") or DEFAULT_ARCH
            check_known(own, architecture_named(arch) if isinstance(arch, str) else architecture_of(arch))
            given["arch"] = settings_of(arch, **own)
        made(self, *positional, **given)

    cls.__init__ = init  # type: ignore[assignment]
    return cls


def check_known(names: Iterable[str], architecture: Architecture, beside: Iterable[str] = (), why: str = "") -> None:
    """Raise ConfigError where an architecture has no such setting, with the nearest name that there is.

    Args:
        names: that are no settings of a training.
        architecture: whose settings they should be.
        beside: other names that may be given there.
        why: what the architecture is, behind its name.
    """
    own = [each.name for each in fields(architecture.settings)]
    for name in names:
        if name not in own:
            known = [*own, *beside, *(each.name for each in fields(TrainConfig))]
            near = near_setting(name, known)
            others = [] if near else architectures_with(our_name(name))
            what = "" if our_name(name) == name else f" {our_name(name)}"
            hint = f' arch="{others[0]}" has{what}.' if others else near
            has = "" if why else f"; it has {', '.join(own) or 'none'}"
            raise ConfigError(f"{name}: {architecture.name}{why} has no such setting{has}.{hint}")


def architectures_with(setting: str) -> list[str]:
    """Return the names of the architectures that have a setting, the default one first."""
    names = sorted(architecture_names(installed=False), key=lambda name: name != DEFAULT_ARCH)
    return [name for name in names if _has(name, setting)]


def _has(architecture: str, name: str) -> bool:
    return any(each.name == name for each in fields(architecture_named(architecture).settings))


def _said(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(map(_said, value))})"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _of_sites(arch: Any, widths: Mapping[str, int]) -> Any:
    """Return settings of an architecture that takes any sites with these; ConfigError where others are asked for."""
    there = {"sites": tuple(widths), "widths": tuple(widths.values())}
    for name, value in there.items():
        if getattr(arch, name) not in (None, value):
            asked, found = (", ".join(map(str, each)) for each in (getattr(arch, name), value))
            raise ConfigError(
                f"{name}: expected {found}, of the activations in their order, got {asked}. Give them in that "
                f"order, or leave {name} out."
            )
    return replace(arch, **there)


def check_own_names(arch: Architecture, taken: Iterable[str]) -> None:
    """Raise ConfigError where settings of an architecture are called as others that they stand beside."""
    for name in taken:
        if any(each.name == name for each in fields(arch.settings)):
            raise ConfigError(
                f"{name}: expected settings of {arch.name} to have names of their own, and a run has "
                "this one; give it another name."
            )


@_flat
@dataclass(frozen=True)
class TrainConfig:
    """Settings of the SAE and its training. Those of the architecture may stand beside them: `TrainConfig(k=64)`.

    Args:
        d_sae: Number of latents. Default: the next power of two from 8 x d_in.
        arch: Architecture of the SAE: its name, or its settings.
        d_in: Width that the activations must have. Default: as they come.
        d_out: Width that what is reconstructed must have. Default: as it comes.
        tokens: Tokens to train on, repeats counted.
        extended: Tokens at which the training had ended before it was extended. From each on, the learning rate rises
            again over warmup_steps and falls to 0 in the last decay_fraction of the steps up to the next end; with a
            decay_fraction of 0 it stays. What an architecture has scheduled stays at its end. Default: none.
        batch_tokens: Tokens in a step; no more than tokens.
        precision: Of products on a GPU; on a CPU those of bf16 round the weights of the decoder and the others nothing.
            float32: the latents chosen are certified to be those of float32 arithmetic. bf16, for large trainings,
            which take two thirds of the time: operands are rounded to bfloat16; weights are kept in two halves of 16
            bits, and no bit of them is lost. float32-int8 and bf16-int8, for a hundred thousand latents and more of
            width 4096: the same operands and float32 sums, but what could be chosen is found by an 8-bit product with
            random rounding. The chance that a million steps miss one latent is below a millionth. Where that does not
            pay, at small sizes and where latents are chosen over a batch or above a threshold, they run as float32 and
            bf16. tf32: operands are rounded to TF32; to compare with.
        moments: float32, or bf16: half the memory of Adam's moments, rounded stochastically. Approximate.
        normalize_activations: How activations are scaled for the training: by a power_of_two, which rounds nothing (the
            deviation of a coordinate becomes about 1/4); to a mean_square of 1, each site for itself; none; or by
            layer_norm or token_norm (the norm alone) of each token, which becomes part of the SAE. Factors are folded
            into the saved SAE. What settings of an architecture say of values is in the unit of scaled activations.
            Default: power_of_two.
        apply_b_dec_to_input: Subtract b_dec from what the encoder sees. Default: as the architecture has it.
        init: What weights start from: random directions, or data: the directions of tokens about their mean, a fifth of
            them random. Biases, and the length of the encoder, are fitted to a sample in both cases. Default: random.
        init_from: Folder of a saved SAE, of any format, or of the run that made it, to go on from: all its weights are
            taken, and training fine-tunes it. Of the same sizes, and of this architecture or of one with the same
            trained weights.
        lr: Peak learning rate of Adam. Default: 8e-4 / sqrt(d_sae / 16384).
        betas: Decay of the moments of Adam. Default: 0.9 and 0.999.
        eps: Added to the root of Adam's second moment, of gradients of a loss that is a fraction of the variance.
            Default: 6.25e-10.
        warmup_steps: Steps of rise of the learning rate; no more than there are. Default: 5 % of the steps, 1000 at
            most.
        warmup: How the learning rate rises: linear, or cosine, which begins and ends slowly. Default: linear.
        warmup_start: Fraction of lr that the rise begins above, such as 0.1. Default: 0.
        decay_fraction: Last fraction of the steps, in which the learning rate falls linearly to 0. Where it overlaps
            the rise, the lower of both holds. Default: 0.2.
        average_tokens: Average the weights over the steps on so many last tokens of the training, and give these to the
            SAE that is saved; 0 keeps the last ones. Takes the memory of the weights once more.
        clip_norm: Largest global norm of the gradient. Default: no clipping.
        auxk: Formula of the auxiliary loss that revives dead latents: that of gao, or as sae_lens, dictionary_learning
            or sparsify have it. Default: gao.
        auxk_alpha: Weight of the auxiliary loss; 0 turns it off. Default: 1 / 32, and 1 with sae_lens.
        k_aux: Dead latents that the auxiliary loss uses for each token. Default: d_in / 2, 1024 and d_sae at most.
        dead_after_tokens: A latent is dead when it was active on none of this many tokens; with more than tokens none
            ever is. Default: tokens / 10, 10 million at most.
        shuffle_tokens: Tokens that are mixed with each other, at least two batches; bounds the memory of the shuffle. A
            stream fills a buffer of so many before the first step, or of all tokens if there are fewer.
        seed: Of the initial weights and of the order of the data.
        log_every_steps: Steps between two lines of the log.
        evaluate_every_steps: Steps between two measurements on held-out tokens. Default: about 20 in a run.
        checkpoint_every_steps: Steps between two checkpoints.
        device: auto, cpu, cuda, cuda:1 ...
    Raises:
        ConfigError: a setting has another type than it declares or is out of its range, or the architecture lacks it.
    """

    d_sae: LeftOpen[PositiveInt] = left_open(lambda config: 1 << (8 * config.d_in - 1).bit_length(), kw_only=False)
    arch: Any = field(default=DEFAULT_ARCH, kw_only=True)
    d_in: LeftOpen[PositiveInt] = left_open()
    d_out: LeftOpen[PositiveInt] = left_open()
    tokens: PositiveInt = field(default=1_500_000, kw_only=True)
    extended: tuple[PositiveInt, ...] = field(default=(), kw_only=True)
    batch_tokens: Annotated[PositiveInt, AtMost("tokens")] = field(default=1024, kw_only=True)
    precision: Precision = field(default="float32", kw_only=True)
    moments: Literal["float32", "bf16"] = field(default="float32", kw_only=True)
    normalize_activations: LeftOpen[Normalization] = left_open("power_of_two")
    apply_b_dec_to_input: bool | None = field(default=None, kw_only=True)
    init: LeftOpen[Literal["random", "data"]] = left_open("random")
    init_from: Path | None = field(default=None, kw_only=True)
    lr: LeftOpen[PositiveFloat] = left_open(lambda config: default_lr(config.d_sae))
    betas: LeftOpen[Annotated[tuple[Annotated[float, DECAY], ...], Length(2)]] = left_open(ADAM_BETAS)
    eps: LeftOpen[Annotated[float, ABOVE_ZERO]] = left_open(ADAM_EPS)
    warmup_steps: LeftOpen[Annotated[NonNegativeInt, AtMost("steps", "the steps of this training")]] = left_open(
        lambda config: min(1000, config.stage(0)[1] // 20)
    )
    warmup: LeftOpen[Literal["linear", "cosine"]] = left_open("linear")
    warmup_start: LeftOpen[Fraction] = left_open(0.0)
    decay_fraction: LeftOpen[Fraction] = left_open(0.2)
    average_tokens: NonNegativeInt = field(default=0, kw_only=True)
    clip_norm: PositiveFloat | None = field(default=None, kw_only=True)
    auxk: LeftOpen[AuxK] = left_open("gao")
    auxk_alpha: LeftOpen[NonNegativeFloat] = left_open(lambda config: 1.0 if config.auxk == "sae_lens" else 1 / 32)
    k_aux: LeftOpen[Annotated[PositiveInt, AtMost("d_sae")]] = left_open(
        lambda config: min(1024, max(1, config.d_in // 2), config.d_sae)
    )
    dead_after_tokens: LeftOpen[PositiveInt] = left_open(
        lambda config: min(10_000_000, max(1, (*config.extended, config.tokens)[0] // 10))
    )
    shuffle_tokens: PositiveInt = field(default=1 << 18, kw_only=True)
    seed: NonNegativeInt = field(default=0, kw_only=True)
    log_every_steps: PositiveInt = field(default=10, kw_only=True)
    evaluate_every_steps: LeftOpen[PositiveInt] = left_open(lambda config: max(1, config.stage(0)[1] // 20))
    checkpoint_every_steps: PositiveInt = field(default=250, kw_only=True)
    device: str = field(default="auto", kw_only=True)

    if TYPE_CHECKING:  # the settings of the architecture have names that only its class knows

        def __init__(self, d_sae: int | None = None, **settings: Any) -> None: ...

    def __post_init__(self) -> None:
        check_fields(self)
        object.__setattr__(self, "arch", settings_of(self.arch))
        architecture = architecture_of(self.arch)
        check_own_names(architecture, (each.name for each in fields(self)))
        widths = getattr(self.arch, "widths", None) if not architecture.sites else None
        check_normalization(architecture, self.normalize_activations, min(widths) if widths else self.d_in)
        check_b_dec(architecture, self.apply_b_dec_to_input)
        if self.init_from is not None:
            if self.init == "data":
                raise ConfigError(BOTH)
            object.__setattr__(self, "init_from", self.init_from.absolute())  # to be found from wherever it is resumed
        if self._ends != sorted(set(self._ends)):
            raise ConfigError(
                f"extended: expected ends of trainings that ascend to tokens = {self.tokens}, at least a step apart, "
                f"got {', '.join(map(str, self.extended))}."
            )
        is_open = [getattr(self, str(term.weight), 0) is None for term in architecture.terms]
        weights = [there or term.weight_in(self.arch, self) for there, term in zip(is_open, architecture.terms)]
        if not any(weights):
            raise ConfigError(f"arch: the terms of the loss of {architecture.title} all have the weight 0.")

    @property
    def steps(self) -> int:
        """Steps of the whole training."""
        return -(-self.tokens // self.batch_tokens)

    def stage(self, step: int) -> tuple[int, int]:
        """Return the steps at which the part of a training begins and ends that a step, counted from 0, is in.

        It is the whole training, unless that was extended.
        """
        number = next((n for n, end in enumerate(self._ends) if step < end), len(self._ends) - 1)
        return self._ends[number - 1] if number else 0, self._ends[number]

    @property
    def _ends(self) -> list[int]:
        return [-(-end // self.batch_tokens) for end in (*self.extended, self.tokens)]

    @property
    def described(self) -> str:
        """Architecture, sizes and the architecture's settings, for people; of filled settings."""
        of_sites = () if architecture_of(self.arch).sites else ("sites", "widths")  # which the plan names anyway
        own_told = {name: value for name, value in told(self.arch).items() if name not in of_sites}
        own = "".join(f", {name} {_said(value)}" for name, value in own_told.items())
        return f"{architecture_of(self.arch).title}, d_sae {self.d_sae:,}{own}"

    @property
    def described_widths(self) -> str:
        """Widths of what is read and reconstructed, of several sites each, for people; of filled settings."""
        several = () if architecture_of(self.arch).sites else self.arch.widths
        wide = width_told(several) or f"{self.d_in:,}"
        return f"d_in {wide}" + (f", d_out {self.d_out:,}" if self.d_out != self.d_in else "")

    def resolve(self, widths: int | Mapping[str, int]) -> TrainConfig:
        """Return the settings with everything filled in that was left to be worked out.

        Args:
            widths: of the activations, by site, in the order in which the architecture names its sites; a number for
                one site.
        Raises:
            ConfigError: other widths or another number of sites are asked for, or a setting is above its bound: k or
                k_aux > d_sae, batch_tokens > tokens, or warmup_steps > steps.
        """
        by_site = {"x": widths} if isinstance(widths, int) else widths
        d_in, d_out = (sum(by_site[site] for site in sites) for sites in architecture_of(self.arch).sites_of(by_site))
        for name, there_is in (("d_in", d_in), ("d_out", d_out)):
            if getattr(self, name) not in (None, there_is):
                raise ConfigError(
                    f"{name}: expected {there_is}, the width of the activations, got {getattr(self, name)}."
                )
        arch = self.arch if architecture_of(self.arch).sites else _of_sites(self.arch, by_site)
        config = fill(replace(self, d_in=d_in, d_out=d_out, arch=arch), before=architecture_of(self.arch).defaults)
        check_bounds(config.arch, config)
        return config

    def flat(self) -> dict[str, Any]:
        """Return the settings by name, those of the architecture beside the others and `arch` its name."""
        own = {each.name: getattr(self.arch, each.name) for each in fields(self.arch)}
        others = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "arch"}
        return {"arch": architecture_of(self.arch).name, **own, **others}
