from __future__ import annotations

import pytest
import torch

from helpers.on_both import DEVICE


@pytest.fixture(params=["reference", "triton"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a test on the reference and on the kernels; where their tensors are to lie."""
    monkeypatch.setenv("FLASHSAE_BACKEND", request.param)
    if request.param == "reference":
        return "cpu"
    pytest.importorskip("triton")
    return DEVICE


@pytest.fixture(params=["reference", "triton"])
def either_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """Run a test on the reference in float64, and in float32, which kernels compute in, on the sparse kernels."""
    if request.param == "triton":
        pytest.importorskip("triton")
    monkeypatch.setenv("FLASHSAE_BACKEND", request.param)
    monkeypatch.setenv("FLASHSAE_DENSE_ABOVE", "1")  # so few latents would be multiplied as a whole
    return torch.float32 if request.param == "triton" else torch.float64


@pytest.fixture
def sparse_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip a test of kernels where there is no Triton; codes are not multiplied as a whole, however small."""
    pytest.importorskip("triton")
    monkeypatch.setenv("FLASHSAE_DENSE_ABOVE", "1")
