"""The training around a dense oracle: AuxK, Adam, and the loop that ours must equal (tier T4)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from flashsae.architecture import Progress, architecture_named, settings_of
from flashsae.optim import ADAM_EPS
from flashsae.sae.config import SAEConfig
from flashsae.testing.composed import oracle
from flashsae.testing.oracles import Params, TopK, dense_decode, dense_pre_acts, stable_topk


def dense_auxk(
    x: Tensor, params: Params, residual: Tensor, dead: Tensor, k_aux: int, *, signed: bool = False
) -> Tensor:
    """Return Σ‖residual − residual_hat‖², residual_hat from the k_aux largest dead latents of each token, no b_dec.

    Args:
        x: [B, d_in].
        params: of the SAE.
        residual: [B, d_out]; no gradient flows into it.
        dead: [d_sae], bool; at least one.
        k_aux: dead latents for each token; all of them where there are fewer.
        signed: whether they are largest by magnitude and keep their sign, as in AbsTopK.
    Source: Gao et al. 2024, appendix A.2.
    """
    pre_acts = dense_pre_acts(x, params["W_enc_T"], params["b_enc"], params.get("b_dec"))
    keys = (pre_acts.abs() if signed else pre_acts).masked_fill(~dead, -torch.inf)
    places = stable_topk(keys, min(k_aux, int(dead.sum())))[1]
    values = pre_acts.gather(-1, places)
    latent_acts = torch.zeros_like(pre_acts).scatter(-1, places, values if signed else values.relu())
    return (residual.detach() - latent_acts @ params["W_dec"]).square().sum()


def auxk_of_sae_lens(
    x: Tensor, params: Params, residual: Tensor, dead: Tensor, k_aux: int, *, target: Tensor, variance: float
) -> Tensor:
    """Return the auxiliary loss of SAELens over the variance of a token: of pre-activations, scaled by how many die."""
    pre_acts = dense_pre_acts(x, params["W_enc_T"], params["b_enc"], params.get("b_dec"))
    values, places = stable_topk(pre_acts.masked_fill(~dead, -torch.inf), min(k_aux, int(dead.sum())))
    latent_acts = torch.zeros_like(pre_acts).scatter(-1, places, values)
    errors = (latent_acts @ params["W_dec"] - residual.detach()).square().sum(-1)
    return min(int(dead.sum()) / k_aux, 1.0) * errors.mean() / variance


def auxk_of_dictionary_learning(
    x: Tensor, params: Params, residual: Tensor, dead: Tensor, k_aux: int, *, target: Tensor, variance: float
) -> Tensor:
    """Return that of dictionary_learning: relative to what of the residual is no constant."""
    errors = dense_auxk(x, params, residual, dead, k_aux) / len(x)
    constant = residual.detach().mean(0)
    return errors / (residual.detach() - constant).square().sum(-1).mean()


def auxk_of_sparsify(
    x: Tensor, params: Params, residual: Tensor, dead: Tensor, k_aux: int, *, target: Tensor, variance: float
) -> Tensor:
    """Return that of sparsify: relative to the variance of the batch, scaled by how many latents are dead."""
    scale = min(1.0, int(dead.sum()) / k_aux)
    return scale * dense_auxk(x, params, residual, dead, k_aux) / (target - target.mean(0)).square().sum()


def auxk_of_gao(
    x: Tensor, params: Params, residual: Tensor, dead: Tensor, k_aux: int, *, target: Tensor, variance: float
) -> Tensor:
    """Return that of Gao et al., relative to the squared residual."""
    return dense_auxk(x, params, residual, dead, k_aux) / residual.detach().square().sum()


AUXK = {
    "gao": auxk_of_gao,
    "sae_lens": auxk_of_sae_lens,
    "dictionary_learning": auxk_of_dictionary_learning,
    "sparsify": auxk_of_sparsify,
}
"""The dense oracle of each form of the auxiliary loss, of arguments as of `dense_auxk`, the target [B, d_out] and the
variance of a token. At least one latent is dead."""


class UnitNormAdam:
    """`torch.optim.Adam` that keeps rows at norm 1, as everybody writes it.

        grad −= (grad · w) w;  Adam;  w /= ‖w‖

    Args:
        parameters: all that are trained.
        W_dec: [d_sae, d_out], the one among them whose rows are kept.
        lr: learning rate.
        settings: of torch.optim.Adam.
    """

    def __init__(self, parameters: Iterable[Tensor], W_dec: Tensor, lr: float, **settings: Any) -> None:
        self.W_dec = W_dec
        self.adam = torch.optim.Adam(parameters, lr, **{"eps": ADAM_EPS, **settings})

    @torch.no_grad()
    def step(self, lr: float | None = None) -> None:
        """Do a step, with another learning rate if one is given, and forget the gradients."""
        grad = self.W_dec.grad
        assert grad is not None
        grad.addcmul_((grad * self.W_dec).sum(1, keepdim=True), self.W_dec, value=-1)
        for group in self.adam.param_groups:
            group["lr"] = group["lr"] if lr is None else lr
        self.adam.step()
        self.adam.zero_grad()
        self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True))


class DenseTrainer:
    """Trains an SAE with dense autograd, from the same weights as ours: what a training must equal (tier T4).

    Args:
        params: initial weights, by name; they are copied.
        lr: learning rate.
        variance: of a token, which the loss is relative to.
        architecture: whose oracle encodes, and whose terms have these weights in the loss; AuxK is not among them.
        topk: what selects, as in `dense_topk`.
        settings: of the architecture, by name; others have their defaults, and numbers of the schedule are those of
            the end, unless a step is given others.
    """

    def __init__(
        self, params: Params, lr: float, variance: float, architecture: str = "topk", *, topk: TopK = stable_topk,
        **settings: Any,
    ) -> None:  # fmt: skip
        self.params = {name: weight.detach().clone().requires_grad_() for name, weight in params.items()}
        self.optimizer = UnitNormAdam(self.params.values(), self.params["W_dec"], lr)
        self._oracle, arch = oracle(architecture), settings_of(architecture, **settings)
        described, (d_sae, d_in) = architecture_named(architecture), params["W_enc_T"].shape
        config = SAEConfig(d_in, d_sae, arch=arch, d_out=len(params["b_dec"]))
        now = {} if described.schedule is None else described.schedule(config, Progress.end())
        self._settings = {"topk": topk, **now, **asdict(arch)}
        terms = {term.name: term for term in described.terms}
        self._weights = {name: terms[name].weight_in(arch) for name in self._oracle.terms}
        self._variance = variance

    def encode(self, x: Tensor, **now: Any) -> Tensor:
        """Return latent_acts [B, d_sae] of tokens [B, d_in], with these numbers of the schedule."""
        return self._oracle(x, self.params, **{**self._settings, **now})

    def fvu(self, x: Tensor, latent_acts: Tensor) -> Tensor:
        """Return Σ‖x − x_hat‖² / (B · variance), differentiable."""
        return (x - dense_decode(latent_acts, self.params)).square().sum() / (len(x) * self._variance)

    def losses(self, x: Tensor, target: Tensor | None = None, **now: Any) -> dict[str, Tensor]:
        """Return each term of the loss, before its weight, with these numbers of the schedule."""
        return self._oracle.losses(x, self.params, self._variance, target=target, **{**self._settings, **now})

    def update(self, loss: Tensor, lr: float | None = None) -> None:
        """Do the backward pass of a loss and a step of Adam."""
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step(lr)

    def step(self, x: Tensor, lr: float | None = None, target: Tensor | None = None, **now: Any) -> Tensor:
        """Do a step on a batch; return the loss before it, the weighted sum of all terms."""
        loss = torch.stack(
            [self._weights[name] * term for name, term in self.losses(x, target, **now).items() if self._weights[name]]
        ).sum()
        self.update(loss, lr)
        return loss.detach()
