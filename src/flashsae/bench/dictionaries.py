"""Training steps of dictionary_learning for the architectures that it trains."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashsae.bench.dense import AutogradStep, autocast, load, state_of
from flashsae.bench.problem import Problem
from flashsae.bench.setups import LEVELS, level_prefixes
from flashsae.errors import require

Pairs = tuple[tuple[Tensor, Tensor], ...]


def _linear(sae: Any, problem: Problem) -> Pairs:
    """With an encoder and a decoder that are modules."""
    W_enc_T, b_enc, W_dec, b_dec = problem.weights
    bias = sae.b_dec if hasattr(sae, "b_dec") else sae.bias
    return (sae.encoder.weight, W_enc_T), (sae.encoder.bias, b_enc), (sae.decoder.weight, W_dec.T), (bias, b_dec)


def _matrices(sae: Any, problem: Problem) -> Pairs:
    """With an encoder and a decoder that are matrices."""
    W_enc_T, b_enc, W_dec, b_dec = problem.weights
    return (sae.W_enc, W_enc_T.T), (sae.b_enc, b_enc), (sae.W_dec, W_dec), (sae.b_dec, b_dec)


def _jump_relu(sae: Any, problem: Problem) -> Pairs:
    """Its encoder does not subtract b_dec, so b_enc starts as what that comes to."""
    W_enc, (_, b_enc), *others = _matrices(sae, problem)
    return (
        W_enc,
        (sae.b_enc, b_enc - problem.W_enc_T @ problem.b_dec),
        *others,
        (sae.threshold, problem.others["threshold"]),
    )


def _gated(sae: Any, problem: Problem) -> Pairs:
    others = (sae.r_mag, problem.others["r_mag"]), (sae.mag_bias, problem.others["b_mag"])
    W_enc_T, b_enc, W_dec, b_dec = problem.weights
    weights = (sae.encoder.weight, W_enc_T), (sae.gate_bias, b_enc), (sae.decoder.weight, W_dec.T)
    return *weights, (sae.decoder_bias, b_dec), *others


@dataclass(frozen=True)
class Trainer:
    """A trainer of dictionary_learning.

    Args:
        module: of dictionary_learning.trainers.
        name: of the class.
        settings: beside the sizes.
        pairs: parameters of its SAE, and what they start from.
        decoder: of its SAE, which is kept at unit norm: a matrix W_dec, or a module; None where nobody does that.
        is_clipped: whether it clips gradients to norm 1.
        share: of the mean error of a token in its loss; gates that are as magnitudes have the same error once more.
    """

    module: str
    name: str
    settings: Callable[[Problem], dict[str, Any]]
    pairs: Callable[[Any, Problem], Pairs] = _linear
    decoder: str | None = "decoder.weight"
    is_clipped: bool = True
    share: float = 1.0


def _k(problem: Problem) -> dict[str, Any]:
    return {"k": problem.shape.k, "auxk_alpha": 0}


def _groups(problem: Problem) -> dict[str, Any]:
    prefixes = level_prefixes(problem.shape)
    sizes = [high - low for low, high in zip([0, *prefixes], prefixes)]
    return {**_k(problem), "group_fractions": [size / problem.shape.d_sae for size in sizes]}


SMALL = 1e-6
"""Weight of a penalty, so small that the loss is the error; it costs the same."""


def _l1(problem: Problem) -> dict[str, Any]:
    return {"l1_penalty": SMALL}


TRAINERS: dict[str, Trainer] = {
    "topk": Trainer("top_k", "TopKTrainer", _k),
    "batch_topk": Trainer("batch_top_k", "BatchTopKTrainer", _k),
    "matryoshka": Trainer(
        "matryoshka_batch_top_k", "MatryoshkaBatchTopKTrainer", _groups, _matrices, "W_dec", share=1 / LEVELS
    ),
    "jump_relu": Trainer(
        "jumprelu", "JumpReluTrainer", lambda problem: {"sparsity_penalty": SMALL, "target_l0": float(problem.shape.k)},
        _jump_relu, "W_dec",
    ),
    "relu": Trainer("standard", "StandardTrainerAprilUpdate", _l1, decoder=None),
    "gated": Trainer("gdm", "GatedSAETrainer", _l1, _gated, None, is_clipped=False, share=2.0),
}  # fmt: skip
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

    decoder: Any = functools.reduce(getattr, kind.decoder.split("."), sae) if kind.decoder else None

    def as_columns(rows: Any) -> Any:
        return rows.T if kind.decoder == "W_dec" else rows

    def update() -> None:
        with autocast(device):
            if decoder is not None:
                grad = common.remove_gradient_parallel_to_decoder_directions(
                    as_columns(decoder), as_columns(decoder.grad), shape.d_in, shape.d_sae
                )
                decoder.grad = as_columns(grad)
            if kind.is_clipped:
                torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
            trainer.optimizer.step()
            trainer.optimizer.zero_grad()
            if decoder is not None:
                columns = common.set_decoder_norm_to_unit_norm(as_columns(decoder), shape.d_in, shape.d_sae)
                decoder.data = as_columns(columns)

    return AutogradStep(loss, update, state_of(sae), lambda value, x: value * len(x) / kind.share)
