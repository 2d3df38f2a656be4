from __future__ import annotations

import pytest
import torch

from flashsae.backend import backends, describe, resolve_device
from flashsae.errors import ConfigError


def test_the_reference_works_everywhere_and_the_others_say_why_not() -> None:
    triton, reference = backends()
    assert (triton.name, reference.name) == ("triton", "reference")
    assert reference.works
    assert not triton.works
    assert triton.reason


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    monkeypatch.setenv("FLASHSAE_DEVICE", "cpu")
    assert resolve_device() == torch.device("cpu")
    for device in ("nonsense", "cuda:77"):
        with pytest.raises(
            ConfigError, match=f"device: expected auto, cpu or a CUDA device that exists, got '{device}'"
        ):
            resolve_device(device)
    monkeypatch.setenv("FLASHSAE_DEVICE", "nonsense")
    with pytest.raises(ConfigError, match="nonsense"):
        resolve_device()


def test_the_machine_is_described() -> None:
    facts = describe()
    assert facts["torch"] == torch.__version__
    assert facts["flashsae"] == "0.1.0"
    assert "threads" in facts["cpu"]
