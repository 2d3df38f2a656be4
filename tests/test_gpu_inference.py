"""Encoding with a trained SAE on a CUDA device: `pytest -m gpu`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import flashsae
from flashsae.architecture import settings_of

pytestmark = pytest.mark.gpu

TOKENS, D_IN, D_SAE = 8192, 512, 65536
THRESHOLD = 2.6
ARCHS: dict[str, dict[str, Any]] = {"topk": {"k": 32}, "batch_topk": {"k": 32}, "jump_relu": {}}


def sae_of(arch: str, dtype: torch.dtype = torch.float32) -> flashsae.SAE:
    sae = flashsae.SAE(flashsae.SAEConfig(D_IN, D_SAE, arch=settings_of(arch, **ARCHS[arch])), device="cuda")
    if hasattr(sae, "threshold"):
        sae.threshold.detach().fill_(THRESHOLD)
    return sae.to(dtype).eval().requires_grad_(False)


def tokens(dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(TOKENS, D_IN, generator=torch.Generator("cuda").manual_seed(0), device="cuda").to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("arch", ARCHS)
def test_encoding_takes_less_than_a_tenth_of_the_memory_of_dense_codes(arch: str, dtype: torch.dtype) -> None:
    sae, x = sae_of(arch, dtype), tokens(dtype)
    sae.encode(x)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    sae.encode(x)
    used = torch.cuda.max_memory_allocated() - before
    assert used < 0.1 * 2 * TOKENS * D_SAE * dtype.itemsize


@pytest.mark.parametrize("arch", ARCHS)
def test_codes_of_bounded_memory_are_those_of_all_at_once(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sae, x = sae_of(arch), tokens(torch.float32)
    bounded = sae.encode(x)
    monkeypatch.setattr(flashsae.SAE, "memory", lambda *_: {})
    whole = sae.encode(x)
    assert torch.equal(bounded.pattern.latents, whole.pattern.latents)
    assert torch.equal(bounded.acts, whole.acts)
    picked = x[:64].double() @ sae.W_enc_T.double().T
    dense = whole.to_dense()[:64].double()
    largest = picked.topk(32).values[:, -1:] if arch == "topk" else THRESHOLD
    assert bool(((picked - largest).abs() < 1e-4)[(dense != 0) != (picked >= largest)].all())
