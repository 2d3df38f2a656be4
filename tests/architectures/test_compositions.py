"""Architectures made of others: loss and every gradient in float64 are those of their dense oracles."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import Tensor

from flashsae import SAE, SAEConfig, TrainConfig
from flashsae.architecture import Progress, settings_of
from flashsae.sae import Step, fvu_weights
from flashsae.testing import oracle

B, D_IN, D_OUT, D_SAE, VARIANCE = 19, 7, 5, 23, 2.7
JUMP = {"target_l0": 4.0, "bandwidth": 0.5}
RANDOM = {"k": 3, "prefix_sampling": "random"}
INNER = [
    ("topk", {"k": 3, "multi_topk": 0.25, "k_start": 5}),
    ("abs_topk", {"k": 3}),
    ("matryoshka:topk", RANDOM),
    ("hierarchical_topk", {"k": 4}),
    ("jump_relu", {**JUMP, "penalty": "tanh", "frequency_weight": 0.2}),
    ("relu", {"p_end": 0.5}),
]
CASES: list[tuple[str, dict[str, Any]]] = [
    *((f"{outer}:{inner}", own) for outer in ("transcoder", "skip_transcoder", "crosscoder") for inner, own in INNER),
    ("transcoder:gated", {"l1": 0.3}),
    ("skip_transcoder:gated", {"l1": 0.3}),
    ("matryoshka:abs_topk", {**RANDOM, "level_loss": "sum"}),
    ("matryoshka:jump_relu", {**JUMP, "ste_to_input": True}),
    ("matryoshka:relu", {}),
    ("matryoshka:gated", {}),
]


@pytest.mark.parametrize(("name", "own"), CASES, ids=[name for name, _ in CASES])
def test_loss_and_every_gradient_are_those_of_the_oracle(
    name: str, own: dict[str, Any], generator: torch.Generator
) -> None:
    if name.startswith("crosscoder"):
        own = {**own, "sites": ("a", "b"), "widths": (3, 4)}
    arch, d_out = settings_of(name, **own), D_OUT if "transcoder" in name else D_IN
    sae = SAE(SAEConfig(D_IN, D_SAE, arch=arch, d_out=d_out), dtype=torch.float64).train()
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
        if hasattr(sae, "threshold") and sae.threshold.dim():
            sae.threshold.abs_()
        sae.normalize_decoder()
    sae.set_progress(Progress(3, 16, 5))
    x = torch.randn(B, D_IN, generator=generator, dtype=torch.float64)
    target = x if d_out == D_IN else torch.randn(B, d_out, generator=generator, dtype=torch.float64)

    config = TrainConfig(d_sae=D_SAE, arch=arch, auxk_alpha=0.0)
    step = Step(sae, x, target, sae.encode(x), fvu_weights(target, VARIANCE))
    loss, terms = step.total(config)
    loss.backward()  # type: ignore[no-untyped-call]

    params: dict[str, Tensor] = {key: value.detach().clone().requires_grad_() for key, value in sae.named_parameters()}
    now = {key: int(value) if key == "k" else value.tolist() for key, value in sae.now.items()}
    weights = {term.name: term.weight_in(arch, config) for term in sae.architecture.terms}
    dense = oracle(name).losses(x, params, VARIANCE, target=target, **{**asdict(arch), **now})
    expected = torch.stack([weights[key] * value for key, value in dense.items() if weights[key]]).sum()
    expected.backward()  # type: ignore[no-untyped-call]

    torch.testing.assert_close(loss, expected)
    for key, parameter in sae.named_parameters():
        torch.testing.assert_close(parameter.grad, params[key].grad, msg=lambda message, key=key: f"{key}: {message}")
    with torch.no_grad():  # what is logged as the FVU is that of the reconstruction of inference
        x_hat = sae.decode(sae.main_part(step.code), like=x)
    torch.testing.assert_close(terms["fvu"], (target - x_hat).square().sum() / (B * VARIANCE))
