"""Training steps of dictionary_learning for the architectures that it trains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flashsae.bench.dense import AutogradStep, autocast, load, state_of, sum_per_token
from flashsae.bench.problem import Problem
from flashsae.errors import require

Pairs = tuple[tuple[Tensor, Tensor], ...]


def _linear(sae: Any, problem: Problem) -> Pairs:
    """With an encoder and a decoder that are modules."""
    W_enc_T, b_enc, W_dec, b_dec = problem.weights
    return (sae.encoder.weight, W_enc_T), (sae.encoder.bias, b_enc), (sae.decoder.weight, W_dec.T), (sae.b_dec, b_dec)


@dataclass(frozen=True)
class Trainer:
    """A trainer of dictionary_learning.

    Args:
        module: of dictionary_learning.trainers.
        name: of the class.
        settings: beside the sizes.
        pairs: parameters of its SAE, and what they start from.
        decoder: from its SAE to the decoder, which is kept at unit norm; None where its optimiser does that.
        is_clipped: whether it clips gradients to norm 1.
    """

    module: str
    name: str
    settings: Callable[[Problem], dict[str, Any]]
    pairs: Callable[[Any, Problem], Pairs] = _linear
    decoder: Callable[[Any], nn.Parameter] | None = lambda sae: sae.decoder.weight
    is_clipped: bool = True


def _k(problem: Problem) -> dict[str, Any]:
    return {"k": problem.shape.k, "auxk_alpha": 0}


TRAINERS: dict[str, Trainer] = {
    "topk": Trainer("top_k", "TopKTrainer", _k),
    "batch_topk": Trainer("batch_top_k", "BatchTopKTrainer", _k),
}
"""By our name of the architecture."""


def dictionary_learning(problem: Problem) -> AutogradStep:
    """dictionary_learning: the loss and update of its trainer in bf16 autocast, as its trainSAE calls them.

    Without the auxiliary loss and its wait, without reading the loss back, and without the running threshold, which
    would wait too. Its Adam is the one that the trainer builds.
    """
    kind = TRAINERS[problem.arch_name]
    module = require(f"dictionary_learning.trainers.{kind.module}", "peers")
    common = require("dictionary_learning.trainers.trainer", "peers")
    shape, device = problem.shape, problem.device
    with torch.device(device):
        trainer = getattr(module, kind.name)(
            steps=100_000,
            activation_dim=shape.d_in,
            dict_size=shape.d_sae,
            layer=0,
            lm_name="none",
            warmup_steps=0,
            device=str(device),
            **kind.settings(problem),
        )
    sae = trainer.ae
    load(*kind.pairs(sae, problem))

    def loss(x: Tensor) -> Tensor:
        with autocast(device):
            result: Tensor = trainer.loss(x.to(torch.bfloat16), step=0)
        return result

    def update() -> None:
        with autocast(device):
            if kind.decoder is not None:
                decoder = kind.decoder(sae)
                decoder.grad = common.remove_gradient_parallel_to_decoder_directions(
                    decoder, decoder.grad, shape.d_in, shape.d_sae
                )
            if kind.is_clipped:
                torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
            trainer.optimizer.step()
            trainer.optimizer.zero_grad()
            if kind.decoder is not None:
                decoder.data = common.set_decoder_norm_to_unit_norm(decoder, shape.d_in, shape.d_sae)

    return AutogradStep(loss, update, state_of(sae), sum_per_token)
