from __future__ import annotations

import pytest

from helpers.on_both import DEVICE


@pytest.fixture(params=["reference", "triton"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a test on the reference and on the kernels; where their tensors are to lie."""
    monkeypatch.setenv("FLASHSAE_BACKEND", request.param)
    if request.param == "reference":
        return "cpu"
    pytest.importorskip("triton")
    return DEVICE
