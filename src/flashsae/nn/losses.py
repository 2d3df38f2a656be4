"""Training losses are sums of squared errors of tokens; what they are relative to is a weight."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from flashsae.ops.variance import total_variance
from flashsae.shapes import Activations


def fvu_weights(target: Activations) -> Float[Tensor, " B"]:
    """Return the weight of each token that makes a squared error a fraction of the variance of the target.

        weights = 1 / Σ‖target − mean_B target‖²

    With them `flashsae.ops.decode_loss` gives the FVU of the batch, or, with what the SAE left over as target, the
    AuxK loss. Both are scale-free: multiplying every activation by a number changes neither.

    Args:
        target: [B, d_in]. The mean is that of the batch, so this estimates the FVU of the whole set.
    Returns:
        [B], float32 (float64 for float64), all equal. A constant batch gives large finite weights, not NaN.
    Gradients: none.
    """
    return (1 / total_variance(target.detach()).clamp_min(1e-30)).repeat(len(target))
