"""TopK: the k largest pre-activations of each token, through a ReLU.

    latent_acts = relu(TopK(pre_acts, k)),   pre_acts = (x − b_dec) @ W_enc + b_enc
    x_hat_k = latent_acts @ W_dec + b_dec
    loss = FVU(x_hat_k) + multi_topk · FVU(x_hat_4k) + auxk_alpha · AuxK,   FVU(x_hat) = Σ‖x − x_hat‖² / (B · variance)

Multi-TopK: x_hat_4k is the reconstruction from the 4·k largest, or all latents if they are fewer, by the same weights.
A latent that falls out of the k largest still learns, and the SAE can be used with other k. Gao et al. weight the
second loss with 1/8. Both come from one selection and one decode pass. What a training logs, which latents are dead and
what AuxK reconstructs goes by the k largest; so does inference.

Annealing: with `k_start`, k moves over the first part of the training from there to `k`,

    linear        k_start + (k − k_start) · f
    exponential   k_start · (k / k_start)^f,   f = step / (k_anneal_fraction · steps), 1 at most

rounded to the nearest number. Selection is exactly that of each step's k. Codes have places for somewhat more, which
hold 0: how many changes WIDTHS times in a training at most, as a captured step is for one number of places.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import flashsae
from flashsae.architecture import AUTOENCODER, AUXK, RECONSTRUCTION, Architecture, Progress, Term
from flashsae.settings.kinds import AtMost, Fraction, LeftOpen, NonNegativeFloat, PositiveInt, check_fields

if TYPE_CHECKING:
    from torch import Tensor

    from flashsae.sae.step import Step

WIDER = 4
"""How many times k the second reconstruction of Multi-TopK has."""

WIDTHS = 10
"""Steps in which the places of a token go from those for one k to those for the other."""


@dataclass(frozen=True)
class TopKSettings:
    """Settings of TopK.

    Args:
        k: Latents active for each token.
        multi_topk: Weight of a second loss, of the reconstruction from 4 times k latents (Multi-TopK); 0.125 in Gao et
            al. 2024. 0: no such loss.
        k_start: Latents active for each token at the first step, from where they become k. Default: k throughout.
        k_anneal: How they become k: linear or exponential.
        k_anneal_fraction: First fraction of the training, in which they do.
    """

    k: Annotated[PositiveInt, AtMost("d_sae")] = 32
    multi_topk: NonNegativeFloat = 0.0
    k_start: LeftOpen[Annotated[PositiveInt, AtMost("d_sae")]] = None  # type: ignore[assignment]
    k_anneal: Literal["linear", "exponential"] = "linear"
    k_anneal_fraction: Fraction = 0.5

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def bounds(self) -> tuple[int, int]:
        """The smallest and the largest k of a training."""
        start = self.k if self.k_start is None else self.k_start
        return min(start, self.k), max(start, self.k)

    @property
    def is_annealed(self) -> bool:
        """Whether k changes."""
        return self.bounds[0] < self.bounds[1]


def own(settings: Any) -> TopKSettings:
    """Return settings of TopK: those of an architecture that somebody made of it may be k alone, or not even that."""
    return settings if isinstance(settings, TopKSettings) else TopKSettings(getattr(settings, "k", 1))


def k_at(settings: Any, progress: Progress) -> int:
    """Return k of a step."""
    settings = own(settings)
    end = settings.k_anneal_fraction
    done = 1.0 if progress.fraction >= end else progress.fraction / end
    if settings.k_start is None or done == 1.0:
        return int(settings.k)
    start, k = settings.k_start, settings.k
    now = start + (k - start) * done if settings.k_anneal == "linear" else start * (k / start) ** done
    return int(now + 0.5)


def width_at(settings: Any, progress: Progress) -> int:
    """Return places for k of a step: the next of a few numbers that ascend by equal factors."""
    (low, high), k = own(settings).bounds, k_at(settings, progress)
    widths = (math.ceil(low * (high / low) ** (step / WIDTHS)) for step in range(WIDTHS))
    return int(next((width for width in widths if width >= k), high))


def encode(sae: Any, x: Tensor) -> Any:
    """Return relu(the k largest of (x − b_dec) @ W_enc + b_enc), in training with Multi-TopK the 4·k largest."""
    settings, ops, scale = own(sae.config.arch), flashsae.ops, sae.selection_scale
    width = sae.width if sae.training else settings.k
    wide = min(WIDER * width, sae.config.d_sae) if settings.multi_topk and sae.training else width
    code: Any = ops.encode_topk(
        x, sae.W_enc_T, sae.b_enc, wide, b_dec=sae.b_pre, key_scale=scale, precision=sae.precision, **sae.memory(x)
    )
    is_annealed = settings.is_annealed and sae.training
    if wide > width or is_annealed:
        code = ops.by_value(code, key_scale=scale)
    if is_annealed:
        code = _first(code, sae, width)
    return code.replace(code.acts.relu())


def _first(code: Any, sae: Any, width: int) -> Any:
    """Return the first entries of each token, as many as k is now; with Multi-TopK the others behind `width` places.

    What is left over of the places holds 0.
    """
    import torch

    k, wide, d_sae = sae.now["k"].long(), code.pattern.k, sae.config.d_sae
    places = width + (min((WIDER - 1) * width, d_sae - 1) if wide > width else 0)
    place = torch.arange(places, dtype=torch.int64, device=code.acts.device)
    source = torch.where(place < width, place, place - width + k)
    is_used = torch.where(place < width, place < k, source < (WIDER * k).clamp_max(d_sae))
    if places > width:
        source = source.clamp_max(wide - 1).expand(len(code.acts), -1)
        pattern = flashsae.ops.Pattern(code.pattern.latents.gather(1, source), d_sae)
        acts = code.acts.gather(1, source)
        code = flashsae.SparseCode(pattern, acts, pre_acts=acts)
    return code.replace(torch.where(is_used, code.acts, 0.0))


def main_part(sae: Any, code: Any) -> Any:
    """Return of a code with places for 4·k latents those of the k largest."""
    width, pattern = sae.width, code.pattern
    if not (sae.training and own(sae.config.arch).multi_topk) or pattern.k is None or pattern.k <= width:
        return code
    part = flashsae.ops.Pattern(pattern.latents[:, :width], pattern.d_sae)
    return flashsae.SparseCode(part, code.acts[:, :width], code.batch_shape)


def levels(sae: Any, code: Any) -> dict[str, Any]:
    """Return of which entries Multi-TopK reconstructs, and with which weights."""
    weight, width, places = own(sae.config.arch).multi_topk, sae.width, code.pattern.k
    if not (sae.training and weight):
        return {}
    if places > width:
        return {"budgets": (width, places), "level_weights": (1.0, weight)}
    return {"budgets": (places,), "level_weights": (1.0 + weight,)}  # all latents there are


def reconstruction(step: Step) -> Tensor:
    """Return the loss of the k largest. Its gradient is that of both losses, which come from one pass."""
    decoded = step.decoded
    if not own(step.sae.config.arch).multi_topk:
        return decoded.loss
    return decoded.loss - (decoded.loss.detach() - decoded.level_losses[0])


def multi_topk(settings: Any) -> float:
    """Return the weight of Multi-TopK, a setting that an architecture made of this one need not have."""
    return own(settings).multi_topk


MULTI = Term(
    "multi_topk_loss",
    "Σ‖x − x_hat_4k‖² / (tokens · variance of a token)",
    "Fraction of the variance that four times as many latents leave unexplained (Multi-TopK, Gao et al. 2024).",
    lambda step: step.decoded.level_losses[-1],
    weight=multi_topk,
)

ARCHITECTURE = Architecture(
    name="topk",
    title="TopK",
    settings=TopKSettings,
    parameters=AUTOENCODER,
    encode=encode,
    terms=(
        Term(RECONSTRUCTION.name, RECONSTRUCTION.formula, RECONSTRUCTION.caption, reconstruction),
        MULTI,
        AUXK,
    ),
    l0=lambda settings: settings.k,
    most=lambda settings: own(settings).bounds[1] * (WIDER if own(settings).multi_topk else 1),
    scales=True,
    levels=levels,
    level_count=lambda settings: 2 if own(settings).multi_topk else 1,
    main_part=main_part,
    schedule=lambda config, progress: {"k": k_at(config.arch, progress)} if own(config.arch).is_annealed else {},
    width=width_at,
    source="Gao et al. 2024, section 2.3 and appendix A.1; Multi-TopK of the same paper",
)
