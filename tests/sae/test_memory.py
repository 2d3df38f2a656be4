"""Inference takes less memory than a training, which multiplies as many tokens at once as it always did."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import flashsae
from flashsae.architecture import settings_of


def test_an_sae_bounds_memory_in_inference_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def spy(x: Tensor, W_enc_T: Tensor) -> dict[str, int]:
        asked.append(len(x))
        return {"workspace_bytes": 1 << 20, "weight_bytes": 1 << 10}

    monkeypatch.setattr(flashsae.ops, "inference_memory", spy)
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    for name in ("topk", "abs_topk", "batch_topk", "hierarchical_topk", "jump_relu", "relu", "gated"):
        sae = flashsae.SAE(flashsae.SAEConfig(8, 64, arch=settings_of(name)))
        sae.encode(x)
        assert asked == [], name
        sae.eval().encode(x)
        assert asked == [5], name
        asked.clear()
