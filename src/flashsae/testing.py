"""What "exact" means, as checks, and the dense code that ours must equal: for tests, here and of any backend or SAE."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from flashsae.errors import ConfigError
from flashsae.optim import ADAM_EPS


def assert_as_accurate(ours: Tensor, theirs: Tensor, exact: Tensor, name: str = "result") -> None:
    """Assert that `ours` is about as close to the truth as PyTorch is (tier T1).

        max|ours - exact| <= 2 * max|theirs - exact| + 2 ulp of max|exact|

    Args:
        ours: what is tested, any shape.
        theirs: PyTorch's dense result in the same dtype.
        exact: the same in float64.
        name: for the message.
    Raises:
        AssertionError: gives both errors and the bound.
    """
    assert ours.shape == exact.shape, f"{name}: shape {list(ours.shape)}, expected {list(exact.shape)}"
    assert ours.dtype == theirs.dtype, f"{name}: dtype {ours.dtype}, expected {theirs.dtype}"
    if exact.numel() == 0:
        return
    error = (ours.double() - exact).abs().max().item()
    peer_error = (theirs.double() - exact).abs().max().item()
    ulp = torch.finfo(ours.dtype).eps * exact.abs().max().item()
    bound = 2 * peer_error + 2 * ulp
    # written so that NaN fails
    assert error <= bound, f"{name}: error {error:.3g}, PyTorch's {peer_error:.3g}, bound {bound:.3g}"


def integer_inputs(
    *shape: int, generator: torch.Generator, largest: int = 4, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return small random integers as floats, so that every sum of products is exact in any order (tier T0)."""
    values = torch.randint(
        -largest, largest + 1, shape, generator=generator, dtype=torch.int64, device=generator.device
    )
    return values.to(dtype)


@contextmanager
def poison_empty() -> Iterator[None]:
    """Fill what `torch.empty` and its kin return with NaN (integers: the lowest), so that unwritten memory shows.

    Reaches inside operators of `torch.ops` and backward threads, where a TorchFunctionMode does not.
    """
    with (
        patch.object(torch, "empty", _poisoned(torch.empty)),
        patch.object(torch, "empty_like", _poisoned(torch.empty_like)),
        patch.object(torch, "empty_strided", _poisoned(torch.empty_strided)),
        patch.object(torch.Tensor, "new_empty", _poisoned(torch.Tensor.new_empty)),
    ):
        yield


def _poisoned(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        result = function(*args, **kwargs)
        if result.is_floating_point():
            result.detach().fill_(torch.nan)
        elif result.dtype != torch.bool:
            result.fill_(torch.iinfo(result.dtype).min)
        return result

    return poisoned


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


Params = Mapping[str, Tensor]
"""Parameters of an SAE by name."""


@dataclass(frozen=True)
class Oracle:
    """The encoder of one architecture, dense and obviously right.

    Args:
        encode: from x, W_enc_T, b_enc, b_dec and settings by name to latent_acts [B, d_sae], as `dense_topk`.
        by_token: whether the code of a token depends on this token alone, so that a batch may be cut.
    """

    encode: Callable[..., Tensor]
    by_token: bool = True

    def __call__(self, x: Tensor, params: Params, *, topk: TopK = stable_topk, **settings: Any) -> Tensor:
        """Return latent_acts [B, d_sae] of tokens [B, d_in], differentiable, in the dtype of the parameters.

        Args:
            x: [B, d_in].
            params: of the SAE.
            topk: what selects, as in `dense_topk`.
            settings: of the architecture, by name.
        """
        weights = {name: params[name] for name in ("W_enc_T", "b_enc", "b_dec")}
        return self.encode(x, **weights, topk=topk, **settings)


ORACLES = {"topk": Oracle(dense_topk), "batch_topk": Oracle(dense_batch_topk, by_token=False)}
"""The dense oracle of each architecture in training, by its name."""


def oracle(architecture: str) -> Oracle:
    """Return the dense oracle of an architecture: `oracle("topk")(x, params, k=32)`.

    Raises:
        ConfigError: there is none.
    """
    if architecture not in ORACLES:
        raise ConfigError(f"architecture: expected one of {', '.join(ORACLES)}, got {architecture!r}.")
    return ORACLES[architecture]


def dense_decode(latent_acts: Tensor, params: Params) -> Tensor:
    """Return x_hat = latent_acts @ W_dec + b_dec, [B, d_out]."""
    return latent_acts @ params["W_dec"] + params["b_dec"]


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
        architecture: whose oracle encodes.
        topk: what selects, as in `dense_topk`.
        settings: of the architecture, by name.
    """

    def __init__(
        self, params: Params, lr: float, variance: float, architecture: str = "topk", *, topk: TopK = stable_topk,
        **settings: Any,
    ) -> None:  # fmt: skip
        self.params = {name: weight.detach().clone().requires_grad_() for name, weight in params.items()}
        self.optimizer = UnitNormAdam(self.params.values(), self.params["W_dec"], lr)
        self._oracle, self._settings = oracle(architecture), {"topk": topk, **settings}
        self._variance = variance

    def encode(self, x: Tensor) -> Tensor:
        """Return latent_acts [B, d_sae] of tokens [B, d_in]."""
        return self._oracle(x, self.params, **self._settings)

    def fvu(self, x: Tensor, latent_acts: Tensor) -> Tensor:
        """Return Σ‖x − x_hat‖² / (B · variance), differentiable."""
        return (x - dense_decode(latent_acts, self.params)).square().sum() / (len(x) * self._variance)

    def update(self, loss: Tensor, lr: float | None = None) -> None:
        """Do the backward pass of a loss and a step of Adam."""
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step(lr)

    def step(self, x: Tensor, lr: float | None = None) -> Tensor:
        """Do a step on a batch; return the FVU before it, which is the loss."""
        loss = self.fvu(x, self.encode(x))
        self.update(loss, lr)
        return loss.detach()
