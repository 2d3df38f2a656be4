"""Whole training steps of other implementations, through their public classes.

Each follows the recipe of its own trainer: forward, backward, what is done to gradients and to the decoder, optimiser.
All hold float32 weights and start from the same ones; squared error, no auxiliary loss. Left out, in their favour, is
what trainers do besides: counting which latents were active, schedules of the learning rate, logging and its waits for
the device. What was chosen for each stands in its docstring.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from flashsae.bench.dense import AutogradStep, dense_pytorch, dense_pytorch_compiled, load, state_of
from flashsae.bench.dictionaries import TRAINERS, dictionary_learning
from flashsae.bench.lens import TRAINING_SAES, sae_lens
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
        build: makes it ready, for the architecture of the problem.
        archs: architectures that it trains.
        install: how to install it.
    """

    name: str
    module: str
    precision: str
    build: Callable[[Problem], AutogradStep]
    archs: tuple[str, ...] = ("topk",)
    install: str = "pip install 'flashsae[peers]'"

    @property
    def is_installed(self) -> bool:
        """Whether its module is there; it is not imported."""
        return importlib.util.find_spec(self.module) is not None


def sparsify(problem: Problem) -> AutogradStep:
    """EleutherAI sparsify (eai-sparsify): SparseCoder, which autocasts to bf16 by itself, and its Trainer's step.

    Trained on the fraction of variance unexplained. Of the optimisers that its Trainer offers the torch Adam, in its
    fused form, which is faster than the one it builds. The norm of the decoder, which it sets before the forward pass,
    is set at the end of the step instead: the same sequence.
    """
    package = require("sparsify", "peers")
    shape, sites, (W_enc_T, b_enc, W_dec, b_dec) = problem.shape, problem.sites, problem.weights
    is_transcoder, has_skip = sites.transcodes, "W_skip" in problem.params
    own = {"transcode": is_transcoder, "skip_connection": has_skip} if is_transcoder else {}
    config = package.SparseCoderConfig(num_latents=shape.d_sae, k=shape.k, **own)
    coder = package.SparseCoder(sites.d_in, config, device=W_dec.device, dtype=torch.float32)
    load((coder.encoder.weight, W_enc_T), (coder.encoder.bias, b_enc), (coder.W_dec, W_dec), (coder.b_dec, b_dec))
    adam = torch.optim.Adam(coder.parameters(), 2e-4 / (shape.d_sae / 2**14) ** 0.5, fused=W_dec.is_cuda)

    def loss(x: Tensor) -> Tensor:
        fvu: Tensor = coder(sites.read(x), sites.written(x)).fvu if is_transcoder else coder(x).fvu
        return fvu

    def update() -> None:
        coder.remove_gradient_parallel_to_decoder_directions()
        adam.step()
        adam.zero_grad()
        coder.set_decoder_norm_to_unit_norm()

    def squared_error(value: float, x: Tensor) -> float:
        return value * len(x) * token_variance(sites.written(x))

    return AutogradStep(loss, update, state_of(coder), squared_error)


PYTORCH = Peer("dense PyTorch", "torch", "bf16", dense_pytorch)
PYTORCH_COMPILED = Peer("dense PyTorch, compiled", "torch", "bf16", dense_pytorch_compiled)
LIBRARIES = (
    Peer("sparsify", "sparsify", "bf16", sparsify, ("topk", "transcoder", "skip_transcoder")),
    Peer("dictionary_learning", "dictionary_learning", "bf16", dictionary_learning, tuple(TRAINERS)),
    Peer("SAELens", "sae_lens", "bf16", sae_lens, tuple(TRAINING_SAES)),
)
"""Libraries that are called as they are."""
