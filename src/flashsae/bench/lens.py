"""Training steps of SAELens for every architecture that it trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flashsae.bench.dense import AutogradStep, autocast, load, state_of, sum_per_token
from flashsae.bench.dictionaries import SMALL
from flashsae.bench.problem import Problem
from flashsae.bench.setups import level_prefixes
from flashsae.errors import require

Settings = Callable[[Problem], dict[str, Any]]


def _topk(problem: Problem) -> dict[str, Any]:
    """Without rescaling by the norms of the decoder, so that it computes what the others do."""
    return {"k": problem.shape.k, "rescale_acts_by_decoder_norm": False}


def _batch_topk(problem: Problem) -> dict[str, Any]:
    return {**_topk(problem), "k": float(problem.shape.k)}


def _matryoshka(problem: Problem) -> dict[str, Any]:
    return {**_batch_topk(problem), "matryoshka_widths": list(level_prefixes(problem.shape))}


def _jump_relu(problem: Problem) -> dict[str, Any]:
    return {"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": float(problem.shape.k)}


@dataclass(frozen=True)
class TrainingSAE:
    """A class of SAELens that trains.

    Args:
        module: of sae_lens.saes.
        name: of the class; that of its settings ends in Config.
        settings: beside the sizes.
        coefficients: of the terms of its loss that its trainer gives with each step.
        loaded: parameters by their name, and ours that they start from.
    """

    module: str
    name: str
    settings: Settings = lambda problem: {}
    coefficients: Mapping[str, float] = field(default_factory=dict)
    loaded: Mapping[str, str] = field(default_factory=lambda: {"b_enc": "b_enc"})


TRAINING_SAES: dict[str, TrainingSAE] = {
    "topk": TrainingSAE("topk_sae", "TopKTrainingSAE", _topk),
    "batch_topk": TrainingSAE("batchtopk_sae", "BatchTopKTrainingSAE", _batch_topk),
    "abs_topk": TrainingSAE("abstopk_sae", "AbsTopKTrainingSAE", _topk),
    "matryoshka": TrainingSAE("matryoshka_batchtopk_sae", "MatryoshkaBatchTopKTrainingSAE", _matryoshka),
    "jump_relu": TrainingSAE(
        "jumprelu_sae", "JumpReLUTrainingSAE", _jump_relu, {"l0": SMALL}, {"b_enc": "b_enc", "threshold": "threshold"}
    ),
    "relu": TrainingSAE("standard_sae", "StandardTrainingSAE", coefficients={"l1": SMALL}),
    "gated": TrainingSAE(
        "gated_sae", "GatedTrainingSAE", coefficients={"l1": SMALL},
        loaded={"b_gate": "b_enc", "b_mag": "b_mag", "r_mag": "r_mag"},
    ),
}  # fmt: skip
"""By our name of the architecture."""


def sae_lens(problem: Problem) -> AutogradStep:
    """SAELens: its training SAE in bf16 autocast, clipping to norm 1 and Adam as its SAETrainer has them.

    With dense activations, its default. No dead latents are given, so the wait for their number falls away.
    """
    require("sae_lens", "peers")
    step_input = require("sae_lens.saes.sae", "peers").TrainStepInput
    kind = TRAINING_SAES[problem.arch_name]
    module = require(f"sae_lens.saes.{kind.module}", "peers")
    shape, (W_enc_T, _, W_dec, b_dec) = problem.shape, problem.weights
    config = getattr(module, f"{kind.name}Config")(
        d_in=shape.d_in,
        d_sae=shape.d_sae,
        dtype="float32",
        device=str(W_dec.device),
        apply_b_dec_to_input=True,
        **kind.settings(problem),
    )
    sae = getattr(module, kind.name)(config)
    load((sae.W_enc, W_enc_T.T), (sae.W_dec, W_dec), (sae.b_dec, b_dec))
    load(*((getattr(sae, theirs), problem.params[ours]) for theirs, ours in kind.loaded.items()))
    adam = torch.optim.Adam(sae.parameters(), lr=3e-4, betas=(0.9, 0.999))
    errors: list[Tensor] = []  # of the last step, those of nested reconstructions behind that of the whole

    def loss(x: Tensor) -> Tensor:
        given = step_input(
            sae_in=x, coefficients=dict(kind.coefficients), dead_neuron_mask=None, n_training_steps=0,
            is_logging_step=False,
        )  # fmt: skip
        with autocast(x.device):
            output = sae.training_forward_pass(given)
        errors[:] = [value.detach() for name, value in output.losses.items() if "mse_loss" in name]
        result: Tensor = output.loss
        return result

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        adam.step()
        adam.zero_grad()

    def error() -> Tensor:
        return torch.stack(errors).mean()

    return AutogradStep(loss, update, state_of(sae), sum_per_token, error=error)
