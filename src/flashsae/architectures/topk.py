"""TopK: the k largest pre-activations of each token, through a ReLU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import flashsae
from flashsae.architecture import AUTOENCODER, AUXK, RECONSTRUCTION, Architecture
from flashsae.settings.kinds import AtMost, PositiveInt, check_fields

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class TopKSettings:
    """Settings of TopK.

    Args:
        k: Latents active for each token.
    """

    k: Annotated[PositiveInt, AtMost("d_sae")] = 32

    def __post_init__(self) -> None:
        check_fields(self)


def encode(sae: Any, x: Tensor) -> Any:
    """Return relu(the k largest of (x − b_dec) @ W_enc + b_enc)."""
    code: Any = flashsae.ops.encode_topk(
        x, sae.W_enc_T, sae.b_enc, sae.config.arch.k, b_dec=sae.b_pre, key_scale=sae.selection_scale,
        precision=sae.precision,
    )  # fmt: skip
    return code.replace(code.acts.relu())


ARCHITECTURE = Architecture(
    name="topk",
    title="TopK",
    settings=TopKSettings,
    parameters=AUTOENCODER,
    encode=encode,
    terms=(RECONSTRUCTION, AUXK),
    l0=lambda settings: settings.k,
    most=lambda settings: settings.k,
    scales=True,
    source="Gao et al. 2024, section 2.3 and appendix A.1",
)
