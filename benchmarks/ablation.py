"""From dense PyTorch to our step, one technique at a time: what each of them is worth.

Each rung is a whole training step: forward, backward, Adam, decoder projected and kept at unit norm; products in bf16.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.steps import whole_step
from flashsae import ops
from flashsae.bench.dense import AutogradStep, adam, dense_pytorch, fast_topk
from flashsae.bench.measure import WholeStep
from flashsae.bench.ours import OurStep, Variant, build_ours, make_config, make_state
from flashsae.bench.peers import PYTORCH
from flashsae.bench.problem import Problem
from flashsae.optim import FactoredAdam
from flashsae.sae.module import SAE
from flashsae.testing import dense_pre_acts
from flashsae.train.config import TrainConfig
from flashsae.train.graph import CapturedSteps
from flashsae.train.optimizer import build_optimizer


class _DenseTopk(torch.autograd.Function):
    """Dense pre-activations and torch.topk; the gradient of the encoder by the index of the code."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W_enc_T: Tensor, b_enc: Tensor, b_dec: Tensor, k: int, made: list[Any]) -> Tensor:
        centred = (x - b_dec).bfloat16()
        values, indices = fast_topk(dense_pre_acts(centred, W_enc_T.bfloat16(), b_enc.bfloat16()), k)
        ctx.pattern = ops.Pattern(indices, len(W_enc_T))
        made.append(ctx.pattern)  # not a result: its index is to be built once
        acts = values.float().relu()
        ctx.save_for_backward(centred, W_enc_T, acts)
        return acts

    @staticmethod
    def backward(ctx: Any, grad_acts: Tensor) -> tuple[Tensor | None, ...]:
        centred, W_enc_T, acts = ctx.saved_tensors
        grad_pre = torch.where(acts > 0, grad_acts, 0.0)
        grad_W_enc_T = ops.latent_rows(ctx.pattern.index, grad_pre, centred, dtype=torch.float32)
        sums = torch.zeros_like(W_enc_T[:, 0]).index_add_(0, ctx.pattern.latents.flatten(), grad_pre.flatten())
        return None, grad_W_enc_T, sums, -(sums @ W_enc_T), None, None


def sparse_decode(problem: Problem) -> AutogradStep:
    """Dense encode and torch.topk; decode, loss and all gradients through the k active latents; fused torch Adam."""
    weights, k = tuple(weight.clone().requires_grad_() for weight in problem.weights), problem.shape.k
    W_enc_T, b_enc, W_dec, b_dec = weights

    def loss(x: Tensor) -> Tensor:
        made: list[ops.Pattern] = []
        acts: Tensor = _DenseTopk.apply(x, W_enc_T, b_enc, b_dec, k, made)  # type: ignore[no-untyped-call]
        return ops.decode_loss(ops.SparseCode(made[0], acts), W_dec, b_dec, x, precision="bf16").loss

    return AutogradStep(loss, adam(weights, W_dec), weights, lambda value, x: value)


def fused_selection(problem: Problem) -> AutogradStep:
    """As before, with `encode_topk`: the pre-activations are selected from a piece at a time, exactly."""
    weights, k = tuple(weight.clone().requires_grad_() for weight in problem.weights), problem.shape.k

    def loss(x: Tensor) -> Tensor:
        W_enc_T, b_enc, W_dec, b_dec = weights
        code = ops.encode_topk(x, W_enc_T, b_enc, k, b_dec=b_dec, precision="bf16")
        return ops.decode_loss(code.replace(code.acts.relu()), W_dec, b_dec, x, precision="bf16").loss

    return AutogradStep(loss, adam(weights, weights[2]), weights, lambda value, x: value)


class _Uncaptured(CapturedSteps):
    """Runs every step as it is called."""

    def __call__(self, step: Callable[[Any], Any], x: Any, kind: object) -> Any:
        return step(x)


def _whole_weights(sae: SAE, config: TrainConfig) -> FactoredAdam:
    return build_optimizer(sae, replace(config, precision="tf32"))  # only products of bf16 numbers split them


def latent_pass(problem: Problem) -> OurStep:
    """As before, with gradients as factors and `FactoredAdam` in one pass over float32 weights."""
    config = make_config(problem, Variant("bf16"))
    return _uncaptured(OurStep(make_state(problem, config, _whole_weights), config, problem.sites))


def split_weights(problem: Problem) -> OurStep:
    """As before, with weights in two halves of 16 bits, of which products read one."""
    return _uncaptured(build_ours(problem, Variant("bf16")))


def _uncaptured(step: OurStep) -> OurStep:
    return replace(step, state=replace(step.state, captured=_Uncaptured()))


def replayed(problem: Problem) -> OurStep:
    """As before, replayed as a CUDA graph: our step."""
    return build_ours(problem, Variant("bf16"))


def screened(problem: Problem) -> OurStep:
    """As before; an 8-bit product in the place of that of bf16, and float32 dot products of what it leaves."""
    return build_ours(problem, Variant("bf16-int8"))


RUNGS: dict[str, Callable[[Problem], WholeStep]] = {
    PYTORCH.name: dense_pytorch,
    "+ sparse decode and backward": sparse_decode,
    "+ exact fused selection": fused_selection,
    "+ latent pass from factors": latent_pass,
    "+ split weights": split_weights,
    "+ CUDA graph": replayed,
    "+ int8 screen": screened,
}
RUNG_PRECISIONS = dict.fromkeys(RUNGS, "bf16") | {"+ int8 screen": "bf16-int8"}
"""Of the products of each rung."""
CASES = tuple(
    Case(name, RUNG_PRECISIONS[name], partial(whole_step, build=build, precision=RUNG_PRECISIONS[name]))
    for name, build in RUNGS.items()
)
