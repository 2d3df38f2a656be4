"""Matryoshka: nested dictionaries, each a prefix of the latents, that have to reconstruct without those behind them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from math import inf
from random import Random
from typing import TYPE_CHECKING, Annotated, Any, Literal

from flashsae.architecture import (
    NESTED,
    Architecture,
    Progress,
    composed_name,
    composed_settings,
)
from flashsae.errors import ConfigError
from flashsae.settings.kinds import Range
from flashsae.settings.prefixes import prefixes_of

if TYPE_CHECKING:
    import flashsae

BASE = "batch_topk"
"""What selects where nothing is said: `matryoshka` is `matryoshka:batch_topk`, and there is `matryoshka:topk`."""

PARETO = 0.5
"""Exponent of the distribution of sampled prefixes: P(prefix ≥ m) falls like m**-PARETO."""

SETTINGS = """
prefixes: Ends of the nested dictionaries, ascending to all latents: as fractions up to 1, or as numbers of latents. 1
    is all of them where it comes last, and one latent before others.
prefix_sampling: fixed, or random: as many prefixes as there are in prefixes, drawn anew at each step.
level_loss: The loss is the mean over the nested reconstructions, or their sum.
"""


def _ascend(prefixes: Any) -> bool:
    return len(prefixes) > 0 and 0 < prefixes[0] <= prefixes[-1] < inf and all(a < b for a, b in pairwise(prefixes))


PREFIXES = Annotated[tuple[float, ...], Range("numbers above 0 that ascend", _ascend)]


def sampled_prefixes(count: int, d_sae: int, seed: int, step: int) -> list[int]:
    """Draw different prefixes, short ones more often; the last of them has all latents.

        m = ⌊(1 − u · (1 − d_sae**-PARETO))**(−1 / PARETO)⌋ for u uniform in [0, 1), again where it was drawn before

    Args:
        count: how many, at most d_sae.
        d_sae: number of latents.
        seed, step: the same give the same, on every device and in every process.
    Returns:
        ascending numbers of latents.
    """
    draw, drawn, share = Random(f"{seed}:{step}"), {d_sae}, 1 - d_sae**-PARETO
    while len(drawn) < min(count, d_sae):
        drawn.add(min(d_sae, int((1 - draw.random() * share) ** (-1 / PARETO))))
    return sorted(drawn)


def schedule(config: flashsae.SAEConfig, progress: Progress) -> Mapping[str, Sequence[float]]:
    """Return the prefixes of a step, where they are sampled; in any case look at them.

    Raises:
        ConfigError: prefixes do not fit d_sae, or there is a loss of other nested reconstructions.
    """
    arch, fixed = config.arch, prefixes_of(config.arch.prefixes, config.d_sae)
    if getattr(arch, "multi_topk", 0.0):
        raise ConfigError(
            f"multi_topk: expected 0 beside prefixes, got {arch.multi_topk:g}: its second loss is of nested entries, "
            "and these are nested latents."
        )
    if arch.prefix_sampling == "fixed":
        return {}
    if progress == Progress.end():
        return {"sampled_prefixes": fixed}
    return {"sampled_prefixes": sampled_prefixes(len(fixed), config.d_sae, progress.seed, progress.step)}


def levels(sae: Any, code: Any) -> dict[str, Any]:
    """Return the prefixes of this step, and the weights of their losses."""
    arch, now = sae.config.arch, sae.now.get("sampled_prefixes")
    prefixes = prefixes_of(arch.prefixes, sae.config.d_sae) if now is None else now.long()
    weights = None if arch.level_loss == "mean" else [1.0] * len(prefixes)
    return {"prefixes": prefixes, "level_weights": weights}


def compose(base: Architecture) -> Architecture:
    """Return the Matryoshka SAE whose codes are those of another architecture.

        x_hat_l = Σ over active latents i < m_l of acts_i · W_dec_i + b_dec,   m_1 < m_2 < ... < m_L = d_sae
        loss = 1/L Σ over l of Σ‖x − x_hat_l‖² / (tokens · variance) + the other terms of the base

    The code is selected once, among all latents, by the rule of the base. AuxK is of the residual of the last
    reconstruction, that of all latents, and so is everything for inference, such as the threshold of BatchTopK.

    The scale of the loss: the paper and SAELens add the L losses up (level_loss = "sum"), here they are averaged, so
    that other terms and learning rates keep their meaning for any L; dictionary_learning divides the sum by L². So the
    same weight of AuxK is relatively L times as much here as in the paper. With Adam nothing else depends on it.

    Prefixes: the paper's groups of 1/32, 1/16, 1/8, 1/4 and the rest of the latents are prefixes of 0.03125, 0.09375,
    0.21875, 0.46875 and 1. Sampled ones are another variant of the paper; the distribution is that of
    `sampled_prefixes`, drawn from the seed and the step alone, so a resumed training draws the same.

    Raises:
        ConfigError: the base has nested reconstructions itself.

    Source: Bussmann et al. 2025, "Learning multi-level features with Matryoshka sparse autoencoders".
    """
    if base.levels is not None and base.main_part is None:
        raise ConfigError(f"arch: {base.title} has nested reconstructions itself; compose matryoshka of another one.")
    name = composed_name("matryoshka", base, BASE)
    settings = composed_settings(
        name,
        base.settings,
        SETTINGS,
        prefixes=(PREFIXES, (0.0625, 0.125, 0.25, 0.5, 1.0)),
        prefix_sampling=(Literal["fixed", "random"], "fixed"),
        level_loss=(Literal["mean", "sum"], "mean"),
    )

    def numbers(config: flashsae.SAEConfig, progress: Progress) -> dict[str, Any]:
        return {**(base.schedule(config, progress) if base.schedule else {}), **schedule(config, progress)}

    return replace(
        base,
        name=name,
        title="Matryoshka" if base.name == BASE else f"Matryoshka {base.title}",
        settings=settings,
        terms=(NESTED, *base.terms[1:]),
        levels=levels,
        level_count=lambda settings: len(settings.prefixes),
        main_part=None,
        schedule=numbers,
        source=f"Bussmann et al. 2025, section 3; {base.source}",
    )
