"""AbsTopK: the k pre-activations of each token that are largest by magnitude, with their signs.

    pre_acts = (x − b_dec) @ W_enc + b_enc
    latent_acts[i] = pre_acts[i] where |pre_acts[i]| is among the k largest of the token, else 0
    x_hat = latent_acts @ W_dec + b_dec
    loss = ‖x − x_hat‖²

Hard thresholding by the ℓ0 constraint alone: without a ReLU, one latent may stand for a direction and its opposite. A
latent is active where its value is not 0. AuxK, which the paper leaves out, reconstructs what is left over by the same
rule: from the k_aux dead latents that are largest by magnitude, with their signs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import flashsae
from flashsae.architecture import AUTOENCODER, AUXK, RECONSTRUCTION, Architecture
from flashsae.settings.kinds import AtMost, PositiveInt, check_fields

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class AbsTopKSettings:
    """Settings of AbsTopK.

    Args:
        k: Latents active for each token, of either sign.
    """

    k: Annotated[PositiveInt, AtMost("d_sae")] = 32

    def __post_init__(self) -> None:
        check_fields(self)


def encode(sae: Any, x: Tensor) -> Any:
    """Return the k of (x − b_dec) @ W_enc + b_enc that are largest by magnitude."""
    return flashsae.ops.encode_topk(
        x, sae.W_enc_T, sae.b_enc, sae.config.arch.k, b_dec=sae.b_pre, key_scale=sae.selection_scale, magnitude=True,
        precision=sae.precision, **sae.memory(x),
    )  # fmt: skip


ARCHITECTURE = Architecture(
    name="abs_topk",
    title="AbsTopK",
    settings=AbsTopKSettings,
    parameters=AUTOENCODER,
    encode=encode,
    terms=(RECONSTRUCTION, AUXK),
    l0=lambda settings: settings.k,
    most=lambda settings: settings.k,
    signed=True,
    scales=True,
    source="Zhu et al. 2025, arXiv 2510.00404: hard thresholding by the largest magnitudes",
)
