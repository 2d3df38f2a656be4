"""Settings by keyword, as `flashsae.fit` takes them: their names and types for editors, and what is made of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields, replace
from inspect import Parameter, Signature, signature
from typing import Any, Literal, TypedDict

from flashsae.architecture import architecture_named, architecture_of, settings_of
from flashsae.precision import Precision
from flashsae.settings.normalization import Normalization
from flashsae.settings.training import AuxK, TrainConfig, check_known


class TrainSettings(TypedDict, total=False):
    """The settings of `flashsae.TrainConfig`, where they are explained, and of its default architecture.

    A test keeps it equal to them. Architectures of other names have other settings, which only their classes know.
    """

    d_sae: int | None
    arch: Any
    d_in: int | None
    d_out: int | None
    tokens: int | None
    extended: tuple[int, ...] | None
    batch_tokens: int | None
    precision: Precision | None
    moments: Literal["float32", "bf16"] | None
    normalize_activations: Normalization | None
    apply_b_dec_to_input: bool | None
    init: Literal["random", "data"] | None
    init_from: Any
    lr: float | None
    betas: tuple[float, float] | None
    eps: float | None
    warmup_steps: int | None
    warmup: Literal["linear", "cosine"] | None
    warmup_start: float | None
    decay_fraction: float | None
    average_tokens: int | None
    clip_norm: float | None
    auxk: AuxK | None
    auxk_alpha: float | None
    k_aux: int | None
    dead_after_tokens: int | None
    shuffle_tokens: int | None
    seed: int | None
    log_every_steps: int | None
    evaluate_every_steps: int | None
    checkpoint_every_steps: int | None
    device: str | None
    k: int | None
    multi_topk: float | None
    k_start: int | None
    k_anneal: Literal["linear", "exponential"] | None
    k_anneal_fraction: float | None


def settings_by_keyword(
    given: Mapping[str, Any], config: TrainConfig | None, beside: Iterable[str] = ()
) -> TrainConfig:
    """Return the settings that are meant, not filled in.

    Args:
        given: settings by name, those of the architecture beside the others. What is None is not given.
        config: what is not given by name. Beside the name of an architecture, what it sets of another one is set of
            this one.
        beside: other names that may be given there, for messages.
    Raises:
        ConfigError: there is no such setting, or one has another type than it declares or is out of its range.
    """
    base = config or TrainConfig()
    of_training = {each.name for each in fields(TrainConfig)}
    own = {name: value for name, value in given.items() if name not in of_training}
    asked = {name: value for name, value in given.items() if name in of_training and value is not None}
    arch = asked.get("arch", base.arch)
    is_name = isinstance(arch, str)
    architecture = architecture_named(arch) if is_name else architecture_of(arch)
    of_config = ", the arch of config," if config is not None and "arch" not in asked else ""
    check_known(own, architecture, beside, of_config)
    own = {name: value for name, value in own.items() if value is not None}
    if is_name:
        there = asdict(base.arch)
        if architecture_of(base.arch) is not architecture:
            there = {name: value for name, value in there.items() if value != getattr(type(base.arch)(), name)}
        asked["arch"] = settings_of(arch, **{**there, **own})
    elif "arch" in asked:
        asked["arch"] = settings_of(arch, **own)
    else:
        asked["arch"] = replace(base.arch, **own)
    return replace(base, **asked)


def signature_with_settings(function: Any) -> Signature:
    """Return the signature of a function whose last parameter is **settings, with every setting of a training in it."""
    own = list(signature(function).parameters.values())
    settings = [
        Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=getattr(kind, "__forward_arg__", kind))
        for name, kind in TrainSettings.__annotations__.items()
    ]
    return signature(function).replace(parameters=[*own[:-1], *settings, own[-1]])
