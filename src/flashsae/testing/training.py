"""The training around a dense oracle: AuxK, Adam, and the loop that ours must equal (tier T4)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from flashsae.architecture import architecture_named, settings_of
from flashsae.optim import ADAM_EPS
from flashsae.testing.oracles import Params, TopK, dense_decode, dense_pre_acts, oracle, stable_topk


def dense_auxk(x: Tensor, params: Params, residual: Tensor, dead: Tensor, k_aux: int) -> Tensor:
    """Return Σ‖residual − residual_hat‖², residual_hat from the k_aux largest dead latents of each token, no b_dec.

    Args:
        x: [B, d_in].
        params: of the SAE.
        residual: [B, d_out]; no gradient flows into it.
        dead: [d_sae], bool; at least one.
        k_aux: dead latents for each token; all of them where there are fewer.
    Source: Gao et al. 2024, appendix A.2.
    """
    pre_acts = dense_pre_acts(x, params["W_enc_T"], params["b_enc"], params.get("b_dec"))
    values, places = stable_topk(pre_acts.masked_fill(~dead, -torch.inf), min(k_aux, int(dead.sum())))
    latent_acts = torch.zeros_like(pre_acts).scatter(-1, places, values.relu())
    return (residual.detach() - latent_acts @ params["W_dec"]).square().sum()


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
        settings: of the architecture, by name; others have their defaults.
    """

    def __init__(
        self, params: Params, lr: float, variance: float, architecture: str = "topk", *, topk: TopK = stable_topk,
        **settings: Any,
    ) -> None:  # fmt: skip
        self.params = {name: weight.detach().clone().requires_grad_() for name, weight in params.items()}
        self.optimizer = UnitNormAdam(self.params.values(), self.params["W_dec"], lr)
        self._oracle, arch = oracle(architecture), settings_of(architecture, **settings)
        self._settings = {"topk": topk, **asdict(arch)}
        terms = {term.name: term for term in architecture_named(architecture).terms}
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
