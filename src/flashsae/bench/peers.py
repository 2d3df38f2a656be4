"""Whole training steps of other implementations of a TopK autoencoder, through their public classes.

Each follows the recipe of its own trainer: forward, backward, what is done to gradients and to the decoder, optimiser.
All hold float32 weights and start from the same ones; squared error, no auxiliary loss. Left out, in their favour, is
what trainers do besides: counting which latents fired, schedules of the learning rate, logging and its waits for the
device. What was chosen for each stands in its docstring.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flashsae.bench.dense import AutogradStep, autocast, dense_pytorch, dense_pytorch_compiled
from flashsae.bench.problem import Problem
from flashsae.errors import require
from flashsae.sae.losses import token_variance


@dataclass(frozen=True)
class Peer:
    """An implementation to stand beside ours.

    Args:
        name: as it stands in results.
        module: that must be installed.
        precision: of its products.
        build: makes it ready.
        install: how to install it.
    """

    name: str
    module: str
    precision: str
    build: Callable[[Problem], AutogradStep]
    install: str = "pip install 'flashsae[peers]'"

    @property
    def is_installed(self) -> bool:
        """Whether its module is there; it is not imported."""
        return importlib.util.find_spec(self.module) is not None


def state_of(module: nn.Module) -> tuple[Tensor, ...]:
    """Return the parameters and buffers of a module."""
    return (*module.parameters(), *module.buffers())


@torch.no_grad()
def load(*pairs: tuple[Tensor, Tensor]) -> None:
    """Copy weights: pairs of theirs and ours."""
    for theirs, ours in pairs:
        theirs.copy_(ours)


def _sum_per_token(loss: float, x: Tensor) -> float:
    return loss * len(x)


def sparsify(problem: Problem) -> AutogradStep:
    """EleutherAI sparsify (eai-sparsify): SparseCoder, which autocasts to bf16 by itself, and its Trainer's step.

    Trained on the fraction of variance unexplained. Of the optimisers that its Trainer offers the torch Adam, in its
    fused form, which is faster than the one it builds. The norm of the decoder, which it sets before the forward pass,
    is set at the end of the step instead: the same sequence.
    """
    package = require("sparsify", "peers")
    shape, (W_enc_T, b_enc, W_dec, b_dec) = problem.shape, problem.weights
    config = package.SparseCoderConfig(num_latents=shape.d_sae, k=shape.k)
    coder = package.SparseCoder(shape.d_in, config, device=W_dec.device, dtype=torch.float32)
    load((coder.encoder.weight, W_enc_T), (coder.encoder.bias, b_enc), (coder.W_dec, W_dec), (coder.b_dec, b_dec))
    adam = torch.optim.Adam(coder.parameters(), 2e-4 / (shape.d_sae / 2**14) ** 0.5, fused=W_dec.is_cuda)

    def loss(x: Tensor) -> Tensor:
        fvu: Tensor = coder(x).fvu
        return fvu

    def update() -> None:
        coder.remove_gradient_parallel_to_decoder_directions()
        adam.step()
        adam.zero_grad()
        coder.set_decoder_norm_to_unit_norm()

    return AutogradStep(loss, update, state_of(coder), lambda value, x: value * len(x) * token_variance(x))


def sae_lens(problem: Problem) -> AutogradStep:
    """SAELens: TopKTrainingSAE in bf16 autocast, clipping to norm 1 and Adam as its SAETrainer has them.

    Without rescaling by the norms of the decoder, so that it computes what the others do; with dense activations, its
    default. No dead latents are given, so the wait for their number falls away.
    """
    require("sae_lens", "peers")
    step_input = require("sae_lens.saes.sae", "peers").TrainStepInput
    topk = require("sae_lens.saes.topk_sae", "peers")
    shape, (W_enc_T, b_enc, W_dec, b_dec) = problem.shape, problem.weights
    config = topk.TopKTrainingSAEConfig(
        d_in=shape.d_in,
        d_sae=shape.d_sae,
        k=shape.k,
        dtype="float32",
        device=str(W_dec.device),
        apply_b_dec_to_input=True,
        rescale_acts_by_decoder_norm=False,
    )
    sae = topk.TopKTrainingSAE(config)
    load((sae.W_enc, W_enc_T.T), (sae.b_enc, b_enc), (sae.W_dec, W_dec), (sae.b_dec, b_dec))
    adam = torch.optim.Adam(sae.parameters(), lr=3e-4, betas=(0.9, 0.999))

    def loss(x: Tensor) -> Tensor:
        given = step_input(sae_in=x, coefficients={}, dead_neuron_mask=None, n_training_steps=0, is_logging_step=False)
        with autocast(x.device):
            result: Tensor = sae.training_forward_pass(given).loss
        return result

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        adam.step()
        adam.zero_grad()

    return AutogradStep(loss, update, state_of(sae), _sum_per_token)


def dictionary_learning(problem: Problem) -> AutogradStep:
    """dictionary_learning: the loss and update of its TopKTrainer in bf16 autocast, as its trainSAE calls them.

    Without the auxiliary loss and its wait, without reading the loss back, and without the running threshold, which
    would wait too. Its Adam is the one that the trainer builds.
    """
    top_k = require("dictionary_learning.trainers.top_k", "peers")
    shape, (W_enc_T, b_enc, W_dec, b_dec) = problem.shape, problem.weights
    device = W_dec.device
    with torch.device(device):
        trainer = top_k.TopKTrainer(
            steps=100_000,
            activation_dim=shape.d_in,
            dict_size=shape.d_sae,
            k=shape.k,
            layer=0,
            lm_name="none",
            auxk_alpha=0,
            warmup_steps=0,
            device=str(device),
        )
    sae = trainer.ae
    decoder = sae.decoder.weight
    load((sae.encoder.weight, W_enc_T), (sae.encoder.bias, b_enc), (decoder, W_dec.T), (sae.b_dec, b_dec))

    def loss(x: Tensor) -> Tensor:
        with autocast(device):
            result: Tensor = trainer.loss(x.to(torch.bfloat16), step=0)
        return result

    def update() -> None:
        with autocast(device):
            decoder.grad = top_k.remove_gradient_parallel_to_decoder_directions(
                decoder, decoder.grad, shape.d_in, shape.d_sae
            )
            torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
            trainer.optimizer.step()
            trainer.optimizer.zero_grad()
            decoder.data = top_k.set_decoder_norm_to_unit_norm(decoder, shape.d_in, shape.d_sae)

    return AutogradStep(loss, update, state_of(sae), _sum_per_token)


PYTORCH = Peer("dense PyTorch", "torch", "bf16", dense_pytorch)
PYTORCH_COMPILED = Peer("dense PyTorch, compiled", "torch", "bf16", dense_pytorch_compiled)
LIBRARIES = (
    Peer("sparsify", "sparsify", "bf16", sparsify),
    Peer("dictionary_learning", "dictionary_learning", "bf16", dictionary_learning),
    Peer("SAELens", "sae_lens", "bf16", sae_lens),
)
"""Libraries that are called as they are."""
