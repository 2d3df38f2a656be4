"""BatchTopK: the B·k largest pre-activations of a batch of B tokens; for inference, all above a threshold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import flashsae
from flashsae.architecture import AUTOENCODER, AUXK, RECONSTRUCTION, Architecture, Parameter
from flashsae.settings.kinds import AtMost, PositiveInt, check_fields

if TYPE_CHECKING:
    from torch import Tensor

AVERAGED_STEPS = 1000
"""Over so many steps, about, the threshold is averaged in long trainings; in shorter ones over the last tenth."""


@dataclass(frozen=True)
class BatchTopKSettings:
    """Settings of BatchTopK.

    Args:
        k: Latents active for each token, on average over a batch.
    """

    k: Annotated[PositiveInt, AtMost("d_sae")] = 32

    def __post_init__(self) -> None:
        check_fields(self)


def encode(sae: Any, x: Tensor) -> Any:
    """Return relu(pre-activations selected): the B·k largest of the batch in training, all above the threshold else."""
    weights, scale = (x, sae.W_enc_T, sae.b_enc), sae.selection_scale
    options = {"b_dec": sae.b_pre, "precision": sae.precision}
    if sae.training:
        code = flashsae.ops.encode_batch_topk(*weights, sae.config.arch.k, key_scale=scale, noise=sae.noise, **options)
    else:
        threshold = sae.threshold if scale is None else sae.threshold / scale
        code = flashsae.ops.encode_above(*weights, threshold, **options | sae.memory(x))
    return code.replace(code.acts.relu())


def average_threshold(sae: flashsae.SAE, code: flashsae.SparseCode) -> None:
    """Let the threshold follow the smallest activation selected in each batch, which falls while an SAE learns."""
    if code.acts.numel() == 0:
        return
    sae.threshold_steps.add_(1)
    scale = sae.selection_scale
    keys = code.acts if scale is None else code.acts * flashsae.ops.per_latent(scale, code.pattern)
    smallest = keys.amin().to(sae.threshold.dtype)
    sae.threshold.lerp_(smallest, (sae.threshold_steps / 10).clamp(1, AVERAGED_STEPS).reciprocal())


ARCHITECTURE = Architecture(
    name="batch_topk",
    title="BatchTopK",
    settings=BatchTopKSettings,
    parameters=(
        *AUTOENCODER,
        Parameter("threshold", (), "what a pre-activation must exceed in inference", power=1, trained=False),
        Parameter("threshold_steps", (), "steps of training that the threshold has seen", trained=False),
    ),
    encode=encode,
    terms=(RECONSTRUCTION, AUXK),
    scales=True,
    l0=lambda settings: settings.k,
    after_step=average_threshold,
    source="Bussmann et al. 2024, section 3 and equation 4",
)
