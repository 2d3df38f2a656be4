"""Activations in another unit: what becomes of parameters, and the normalisation that no parameter can take over."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flashsae.architecture import Parameter
from flashsae.errors import ConfigError, ShapeError
from flashsae.settings.normalization import LAYER_NORM

EPS = 1e-5
"""What `layer_norm` adds to the deviation of a token, in its own unit."""

Factor = float | Tensor
"""One positive number, or one for each coordinate: [d], float64, on the CPU."""


def token_statistics(x: Tensor, widths: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
    """Return the mean of each token and what `layer_norm` divides by, float64: [..., 1], of several sites [..., d_in].

        mean_j x_j,   sqrt(Σ_j (x_j − mean)² / (d_in − 1)) + 1e-5

    Args:
        x: [..., d_in], float, d_in > 1.
        widths: of sites that stand beside each other, each of which is a token of its own.
    Source: SAELens, normalize_activations="layer_norm": the deviation is the unbiased one.
    """
    if len(widths) > 1:
        sites = [(site, *token_statistics(site)) for site in torch.split(x, list(widths), dim=-1)]
        mean, deviation = (torch.cat([each[i].expand(each[0].shape) for each in sites], dim=-1) for i in (1, 2))
        return mean, deviation
    deviation, mean = torch.std_mean(x.double(), dim=-1, keepdim=True)
    return mean, deviation + EPS


def token_norm(x: Tensor, widths: Sequence[int] = ()) -> Tensor:
    """Return what `token_norm` divides tokens by, float64: [..., 1], of several sites [..., d_in].

        ‖x‖ / √d_in

    Args:
        x: [..., d_in], float.
        widths: of sites that stand beside each other, each of which is a token of its own.
    Source: SAELens, normalize_activations="constant_norm_rescale", which divides by 0 where a token is 0; here that
        token stays 0, and so does its reconstruction.
    """
    sites = torch.split(x, list(widths), dim=-1) if len(widths) > 1 else [x]
    norms = [torch.linalg.vector_norm(site.double(), dim=-1, keepdim=True) / site.shape[-1] ** 0.5 for site in sites]
    return norms[0] if len(norms) == 1 else torch.cat([n.expand(s.shape) for n, s in zip(norms, sites)], dim=-1)


def normalized(kind: str, x: Tensor, dtype: torch.dtype | None = None, widths: Sequence[int] = ()) -> Tensor:
    """Return tokens as an SAE sees them that normalises each by itself.

    Args:
        kind: layer_norm, or token_norm: x · √d_in / ‖x‖.
        x: [..., d_in], float.
        dtype: of the result; that of x by default.
        widths: of sites that stand beside each other, each of which is normalised by itself.
    Numerics, Gradients: as of `layer_norm`.
    """
    if kind == LAYER_NORM:
        return layer_norm(x, dtype, widths)
    norm = token_norm(x, widths)
    return (x.double() / norm.where(norm > 0, 1.0)).to(dtype or x.dtype)


def as_they_come(kind: str, x_hat: Tensor, like: Tensor, widths: Sequence[int] = ()) -> Tensor:
    """Return the reconstruction of tokens that were `normalized`, in the unit of these: `like`, [..., d_in]."""
    if kind == LAYER_NORM:
        mean, deviation = token_statistics(like, widths)
        return (x_hat.double() * (deviation - EPS) + mean).to(x_hat.dtype)
    return (x_hat.double() * token_norm(like, widths)).to(x_hat.dtype)


def layer_norm(x: Tensor, dtype: torch.dtype | None = None, widths: Sequence[int] = ()) -> Tensor:
    """Return tokens without their mean, over their deviation: (x − mean) / (std + 1e-5).

    Args:
        x: [..., d_in], float, d_in > 1.
        dtype: of the result; that of x by default.
        widths: of sites that stand beside each other, each of which is normalised by itself.
    Numerics: computed in float64, rounded once: no square leaves the range, and equal coordinates give 0.
    Gradients: of x.
    """
    mean, deviation = token_statistics(x, widths)
    return ((x.double() - mean) / deviation).to(dtype or x.dtype)


@dataclass(frozen=True)
class Units:
    """Factors between activations as they come and as an SAE sees them, and what they make of its parameters.

    With S_in and S_out the diagonal matrices of the factors and λ the factor of latents, the SAE for activations as
    they come has, of parameters with a dash,

        W_enc = S_in W_enc' / λ     b_enc = b_enc' / λ     threshold = threshold' / λ
        W_dec = λ W_dec' / S_out    b_dec = b_dec' / S_out     W_skip = W_skip' S_in / S_out

    which gives x_hat = x_hat' / S_out and the code over λ: the same latents. λ is the factor of what is reconstructed
    where that is one number, so that W_dec stays as it is; otherwise a power of two that leaves the rows of W_dec near
    their norm.

    Args:
        reads: of what goes in.
        writes: of what is reconstructed.
        latents: λ, what values of latents are divided by.
    """

    reads: Factor
    writes: Factor
    latents: float

    @classmethod
    def of(cls, reads: object, writes: object, d_in: int, d_out: int) -> Units:
        """Return checked factors; such that are all equal as one number.

        Raises:
            ConfigError: they are not positive numbers.
            ShapeError: there is not one for each coordinate.
        """
        written = _factor(writes, d_out)
        if isinstance(written, float):
            latents = written
        else:
            latents = 2.0 ** round(math.log2(written.square().reciprocal().mean().item()) / -2)
        return cls(_factor(reads, d_in), written, latents)

    @property
    def is_one(self) -> bool:
        """Whether what goes in and what is reconstructed have the same factors."""
        reads, writes = (torch.as_tensor(each, dtype=torch.float64) for each in (self.reads, self.writes))
        return reads.shape == writes.shape and torch.equal(reads, writes)

    def inverse(self) -> Units:
        """Return what undoes it."""
        return Units(1 / self.reads, 1 / self.writes, 1 / self.latents)

    def fold(self, row: Parameter, value: Tensor) -> Tensor:
        """Return a parameter of the SAE for activations as they come; itself where nothing changes.

        Args:
            row: its line in the table, whose shape says what it maps to what.
            value: of the SAE for activations that were multiplied.
        """
        divisor = self._divisor(row)
        if isinstance(divisor, float):
            return value if divisor == 1.0 else value / divisor
        wide = torch.promote_types(value.dtype, torch.float32)
        return (value.to(wide) / divisor.to(value.device, wide)).to(value.dtype)

    def _divisor(self, row: Parameter) -> Factor:
        """Return what a parameter is divided by: a number, or a tensor that stretches over it."""
        units: dict[str, Factor] = {"d_in": self.reads, "d_out": self.writes, "d_sae": self.latents}
        if len(row.shape) < 2:
            unit = units[row.shape[0]] if row.shape else self.latents
            return unit**row.power
        to, of = row.shape[0], row.shape[-1]  # as a matrix, and so W_enc_T and W_skip, stands before what it multiplies
        if to == "d_sae" and of == "d_out":
            to, of = of, to  # a row a latent: W_dec stands behind
        is_turned = row.shape[0] == of
        one, other = units[to], units[of]
        if isinstance(one, float) and isinstance(other, float):
            divisor: Factor = one / other
        else:
            divisor = torch.as_tensor(one, dtype=torch.float64, device="cpu")
            divisor = divisor if divisor.dim() == 0 or is_turned else divisor[:, None]
            over = torch.as_tensor(other, dtype=torch.float64, device="cpu")
            divisor = divisor / (over[:, None] if over.dim() and is_turned else over)
        return divisor * self.latents**row.power


def _factor(given: object, width: int) -> Factor:
    """Return a checked factor; numbers that are all equal as one."""
    if isinstance(given, Tensor):
        if given.shape != (width,):
            raise ShapeError(f"factor: expected a number, or a tensor of the shape [{width}], got {list(given.shape)}.")
        factors = given.detach().to("cpu", torch.float64)
        if not bool(((factors > 0) & factors.isfinite()).all()):
            raise ConfigError("factor: expected positive numbers, got others among them.")
        return factors if bool((factors != factors[0]).any()) else factors[0].item()
    if isinstance(given, bool) or not isinstance(given, int | float) or not 0 < given < math.inf:
        raise ConfigError(f"factor: expected a positive number, got {given!r}.")
    return float(given)
