"""Training losses. Scale-free: multiplying every activation by a number changes none of them."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from flashsae.shapes import Activations


def fvu_loss(x: Activations, x_hat: Activations) -> Float[Tensor, ""]:
    """Compute the squared error of a batch as a fraction of its variance.

        Σ‖x − x_hat‖² / Σ‖x − mean_B x‖²

    Args:
        x, x_hat: [B, d_in].
    Returns:
        scalar, dtype of x_hat. The mean is that of the batch, so this estimates the FVU of the whole set.
    Gradients: x_hat.
    """
    return (x - x_hat).square().sum() / _variance(x)


def auxk_loss(residual: Activations, residual_hat: Activations) -> Float[Tensor, ""]:
    """Compute how badly dead latents explain what the living ones left over.

        Σ‖residual − residual_hat‖² / Σ‖residual − mean_B residual‖²

    Args:
        residual: [B, d_in], x − x_hat; no gradient flows into it.
        residual_hat: [B, d_in], the reconstruction from the k_aux largest dead latents, without b_dec.
    Returns:
        scalar. About 1 when the dead latents explain nothing. To be weighted by auxk_alpha (1/32).
    Gradients: residual_hat; by way of it W_dec, W_enc_T, b_enc and b_dec.
    Source: Gao et al. 2024, "Scaling and evaluating sparse autoencoders", appendix A.2. The paper leaves the
        normalisation open; here it is the variance of the residual in the batch.
    """
    target = residual.detach()
    return (target - residual_hat).square().sum() / _variance(target)


def _variance(x: Activations) -> Float[Tensor, ""]:
    """Return Σ‖x − mean_B x‖², at least the smallest normal number, so that a constant batch gives no NaN."""
    x = x.detach()
    return (x - x.mean(0)).square().sum().clamp_min(1e-30)
