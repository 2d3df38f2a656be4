"""The dense oracle of each architecture: what it computes, in a few lines and obviously right."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from inspect import signature
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

TopK = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""From values [..., n] and k to the k largest along the last dimension and where they stand: [..., k] each."""


def stable_topk(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest by the rule of the library, the slow and obvious way: of equal ones the lowest index.

    Returns:
        values and indices, [..., k], by index; the values are differentiable.
    """
    places = values.sort(dim=-1, descending=True, stable=True).indices[..., :k].sort(dim=-1).values
    return values.gather(-1, places), places


def chosen(indices: Tensor) -> TopK:
    """Return a "topk" that picks what is given, so that a gradient is compared for the same selection."""
    return lambda values, k: (values.gather(-1, indices), indices)


def dense_pre_acts(x: Tensor, W_enc_T: Tensor, b_enc: Tensor, b_dec: Tensor | None = None) -> Tensor:
    """Return (x − b_dec) @ W_enc + b_enc, [B, d_sae], in the dtype of its arguments."""
    return F.linear(x if b_dec is None else x - b_dec, W_enc_T, b_enc)


def dense_topk(
    x: Tensor, W_enc_T: Tensor, b_enc: Tensor, k: int, b_dec: Tensor | None = None, *, topk: TopK = stable_topk
) -> Tensor:
    """Return latent_acts, [B, d_sae], of a TopK SAE as everybody writes it: naive autograd, dense everywhere.

    Args:
        x: [B, d_in].
        W_enc_T: [d_sae, d_in].
        b_enc: [d_sae].
        k: latents kept for each token.
        b_dec: [d_in].
        topk: what selects: `stable_topk` by the rule of the library, `torch.topk` where speed counts more than ties.
    Source: Gao et al. 2024.
    """
    pre_acts = dense_pre_acts(x, W_enc_T, b_enc, b_dec)
    values, places = topk(pre_acts, k)
    return torch.zeros_like(pre_acts).scatter(-1, places, values.relu())


def dense_batch_topk(
    x: Tensor, W_enc_T: Tensor, b_enc: Tensor, k: int, b_dec: Tensor | None = None, *, topk: TopK = stable_topk
) -> Tensor:
    """Return latent_acts, [B, d_sae], of a BatchTopK SAE: those of the B · k largest pre-activations of the batch.

    Arguments as of `dense_topk`; of equal ones the first token, then the lowest latent.

    Source: Bussmann et al. 2024.
    """
    pre_acts = dense_pre_acts(x, W_enc_T, b_enc, b_dec)
    values, places = topk(pre_acts.flatten(), len(x) * k)
    return torch.zeros_like(pre_acts).flatten().scatter(-1, places, values.relu()).view_as(pre_acts)


def dense_abs_topk(
    x: Tensor, W_enc_T: Tensor, b_enc: Tensor, k: int, b_dec: Tensor | None = None, *, topk: TopK = stable_topk
) -> Tensor:
    """Return latent_acts, [B, d_sae], of an AbsTopK SAE: the k pre-activations largest by magnitude, with their signs.

    Arguments as of `dense_topk`; of equal magnitudes the lowest index.

    Source: Zhu et al. 2025, arXiv 2510.00404.
    """
    pre_acts = dense_pre_acts(x, W_enc_T, b_enc, b_dec)
    _, places = topk(pre_acts.abs(), k)
    return torch.zeros_like(pre_acts).scatter(-1, places, pre_acts.gather(-1, places))


Params = Mapping[str, Tensor]
"""Parameters of an SAE by name."""


def dense_decode(latent_acts: Tensor, params: Params) -> Tensor:
    """Return x_hat = latent_acts @ W_dec + b_dec, [B, d_out]."""
    return latent_acts @ params["W_dec"] + params["b_dec"]


@dataclass(frozen=True)
class DenseStep:
    """A step of a dense training, up to its loss: what terms are computed of, as `flashsae.sae.Step`.

    Args:
        params: of the SAE.
        encoder: those of them that the encoder has.
        x: [B, d_in].
        target: [B, d_out], what is to be reconstructed; x itself for an autoencoder.
        latent_acts: [B, d_sae], of x.
        variance: of a token, which the loss is relative to.
        settings: of the architecture, and numbers of its schedule, as attributes.
    """

    params: Params
    encoder: Params
    x: Tensor
    target: Tensor
    latent_acts: Tensor
    variance: float
    settings: SimpleNamespace

    @cached_property
    def pre_acts(self) -> Tensor:
        """(x − b_dec) @ W_enc + b_enc, [B, d_sae]; b_dec where the encoder has it."""
        encoder = self.encoder
        return dense_pre_acts(self.x, encoder["W_enc_T"], encoder["b_enc"], encoder.get("b_dec"))

    def fvu(self, x_hat: Tensor) -> Tensor:
        """Return Σ‖target − x_hat‖² / (B · variance)."""
        return (self.target - x_hat).square().sum() / (len(self.x) * self.variance)


def dense_reconstruction(step: DenseStep) -> Tensor:
    """Return the first term of every autoencoder: the FVU of latent_acts @ W_dec + b_dec."""
    return step.fvu(dense_decode(step.latent_acts, step.params))


def dense_prefixes(step: DenseStep) -> Tensor:
    """Return the loss of a Matryoshka SAE: the FVU of each prefix of the latents, decoded on its own.

    Source: Bussmann et al. 2025.
    """
    settings, d_sae = step.settings, step.latent_acts.shape[1]
    sizes = getattr(settings, "sampled_prefixes", None)
    if sizes is None:  # fractions up to 1, or numbers of latents; 1 is all of them where it comes last
        given, last = settings.prefixes, settings.prefixes[-1]
        sizes = {max(1, round(each * d_sae)) if each < 1 or each == last == 1 else each for each in given}
    kept = [
        step.latent_acts * (torch.arange(d_sae, dtype=torch.int64, device=step.x.device) < int(size)) for size in sizes
    ]
    losses = torch.stack([step.fvu(dense_decode(latent_acts, step.params)) for latent_acts in kept])
    return losses.sum() if settings.level_loss == "sum" else losses.mean()


def dense_budgets(step: DenseStep) -> Tensor:
    """Return the loss of a Hierarchical TopK SAE: the mean FVU of the j largest latents of each token.

    Source: Balagansky et al. 2025.
    """
    k = step.settings.k
    places = stable_descending(step.latent_acts * getattr(step.settings, "key_scale", 1.0), k)[1]
    values = step.latent_acts.gather(-1, places)
    losses = []
    for budget in step.settings.budgets or range(1, k + 1):
        largest = torch.zeros_like(step.latent_acts).scatter(-1, places[:, :budget], values[:, :budget])
        losses.append(step.fvu(dense_decode(largest, step.params)))
    return torch.stack(losses).mean()


def stable_descending(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest, the largest first, of equal ones the lowest index; the values are differentiable."""
    places = values.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    return values.gather(-1, places), places


def dense_multi_topk(step: DenseStep) -> Tensor:
    """Return the FVU of the reconstruction from 4 · k latents of a TopK SAE; 0 where it has no weight.

    Source: Gao et al. 2024 (Multi-TopK).
    """
    if not getattr(step.settings, "multi_topk", 0):
        return step.x.new_zeros(())
    k = min(4 * step.settings.k, len(step.params["W_dec"]))
    places = step.settings.topk(step.pre_acts * getattr(step.settings, "key_scale", 1.0), k)[1]
    latent_acts = torch.zeros_like(step.pre_acts).scatter(-1, places, step.pre_acts.gather(-1, places).relu())
    return step.fvu(dense_decode(latent_acts, step.params))


@dataclass(frozen=True)
class Oracle:
    """One architecture in training, dense and obviously right.

    Args:
        encode: from x, the parameters in `params`, and those settings that are arguments of it (and topk, if it is) to
            latent_acts [B, d_sae], as `dense_topk`.
        by_token: whether the code of a token depends on this token alone, so that a batch may be cut.
        params: of the encoder, by name.
        terms: of the loss, by the names they have in the architecture, but for AuxK: `dense_auxk`. Each a scalar of a
            `DenseStep`, before its weight; None where the settings ask for none.
    """

    encode: Callable[..., Tensor]
    by_token: bool = True
    params: tuple[str, ...] = ("W_enc_T", "b_enc", "b_dec")
    terms: Mapping[str, Callable[[DenseStep], Tensor | None]] = field(
        default_factory=lambda: {"fvu": dense_reconstruction}
    )

    def __call__(self, x: Tensor, params: Params, *, topk: TopK = stable_topk, **settings: Any) -> Tensor:
        """Return latent_acts [B, d_sae] of tokens [B, d_in], differentiable, in the dtype of the parameters.

        Args:
            x: [B, d_in].
            params: of the SAE.
            topk: what selects, as in `dense_topk`.
            settings: of the architecture, and numbers of its schedule, by name.
        """
        taken = signature(self.encode).parameters
        own = {name: value for name, value in {**settings, "topk": topk}.items() if name in taken}
        return self.encode(x, **{name: params[name] for name in self.params}, **own)

    def losses(
        self, x: Tensor, params: Params, variance: float, *, target: Tensor | None = None, topk: TopK = stable_topk,
        **settings: Any,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Return each term of the loss, before its weight: scalars, differentiable.

        Args:
            x, params, topk, settings: as above; all settings that a term needs.
            variance: of a token, which the loss is relative to.
            target: [B, d_out], what is to be reconstructed; None is x.
        """
        latent_acts = self(x, params, topk=topk, **settings)
        encoder = {name: params[name] for name in self.params}
        target = x if target is None else target
        step = DenseStep(params, encoder, x, target, latent_acts, variance, SimpleNamespace(**settings, topk=topk))
        values = {name: term(step) for name, term in self.terms.items()}
        return {name: value for name, value in values.items() if value is not None}


def dense_relu(x: Tensor, W_enc_T: Tensor, b_enc: Tensor, b_dec: Tensor | None = None) -> Tensor:
    """Return latent_acts, [B, d_sae], of a ReLU SAE.

    Source: Bricken et al. 2023.
    """
    return dense_pre_acts(x, W_enc_T, b_enc, b_dec).relu()


def dense_norm_penalty(step: DenseStep) -> Tensor:
    """Return the mean over tokens of Σ acts · ‖their rows of W_dec‖ / √variance, as of a ReLU SAE in training.

    Norms have no gradient: it lies along the rows, and what keeps their norm takes that away. The numbers of the
    schedule are `ramp` and the exponent `p`; with one below 1 the L1 norm gives the value, and the powers the slopes.

    Source: Bricken et al. 2023; Anthropic's update of April 2024 (norms); Karvonen et al. 2024 (exponent).
    """
    settings, small = step.settings, 1e-3
    acts = step.latent_acts * step.params["W_dec"].detach().norm(dim=1) / step.variance**0.5
    p = getattr(settings, "p", 1.0)
    powers = (acts + small) ** p - small**p
    scale = acts.sum() / powers.sum().clamp_min(1e-30)
    penalty: Tensor = settings.ramp * scale.detach() * powers.sum() / len(acts)
    return penalty


ORACLES = {
    "topk": Oracle(dense_topk, terms={"fvu": dense_reconstruction, "multi_topk_loss": dense_multi_topk}),
    "batch_topk": Oracle(dense_batch_topk, by_token=False),
    "abs_topk": Oracle(dense_abs_topk),
    "matryoshka": Oracle(dense_batch_topk, by_token=False, terms={"nested_fvu": dense_prefixes}),
    "matryoshka:topk": Oracle(dense_topk, terms={"nested_fvu": dense_prefixes}),
    "hierarchical_topk": Oracle(dense_topk, terms={"nested_fvu": dense_budgets}),
    "relu": Oracle(dense_relu, terms={"fvu": dense_reconstruction, "sparsity": dense_norm_penalty}),
}
"""The dense oracle of each architecture in training, by its name."""
