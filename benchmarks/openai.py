"""OpenAI's sparse_autoencoder beside ours. It does not run on one GPU as it is published: one function is replaced."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashsae.bench.dense import AutogradStep, autocast, backward, load, state_of
from flashsae.bench.peers import Peer
from flashsae.bench.problem import Problem
from flashsae.errors import require


def _run_on_one_gpu(train: Any) -> None:
    """Have its top-k not ask for the number of GPUs that share the latents, where there is one."""
    if train.sharded_topk.__name__ != "sharded_topk":
        return
    sharded_topk = train.sharded_topk

    def topk_on_one_gpu(x: Tensor, k: int, sh_comm: Any, capacity_factor: Any = None) -> tuple[Tensor, Tensor]:
        # on one GPU sh_comm is None, and the original asks None for its size when a capacity factor is given
        result: tuple[Tensor, Tensor] = sharded_topk(x, k, sh_comm, None if sh_comm is None else capacity_factor)
        return result

    train.sharded_topk = topk_on_one_gpu


def openai(problem: Problem) -> AutogradStep:
    """OpenAI sparse_autoencoder: fp16 autocast, loss scale and fused Adam, as its training_loop_ has them.

    No clipping and no moving average of weights, its defaults; the loss is not printed at each step.
    """
    train, kernels = (require(f"sparse_autoencoder.{name}", "peers") for name in ("train", "kernels"))
    _run_on_one_gpu(train)
    shape, (W_enc_T, b_enc, W_dec, b_dec) = problem.shape, problem.weights
    device = W_dec.device
    with torch.device(device):
        sae = train.FastAutoencoder(shape.d_sae, shape.d_in, shape.k, auxk=None, dead_steps_threshold=10**9)
    load((sae.encoder.weight, W_enc_T), (sae.latent_bias, b_enc), (sae.decoder.weight, W_dec.T), (sae.pre_bias, b_dec))
    adam = torch.optim.Adam(sae.parameters(), lr=1e-4, eps=6.25e-10, fused=W_dec.is_cuda)
    scaler = torch.amp.GradScaler(device.type)

    def loss(x: Tensor) -> Tensor:
        with autocast(device, torch.float16):
            result: Tensor = kernels.mse(sae(x)[0], x)
        return result

    def update() -> None:
        train.unit_norm_decoder_(sae)
        train.unit_norm_decoder_grad_adjustment_(sae)
        scaler.unscale_(adam)
        scaler.step(adam)
        scaler.update()
        adam.zero_grad()

    return AutogradStep(
        loss,
        update,
        state_of(sae),
        lambda value, x: value * x.numel(),
        backward=lambda value: backward(scaler.scale(value)),
    )


OPENAI = Peer(
    "OpenAI", "sparse_autoencoder", "fp16", openai,
    install="pip install git+https://github.com/openai/sparse_autoencoder",
)  # fmt: skip
