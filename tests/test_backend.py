from __future__ import annotations

import importlib.util
import os

import pytest
import torch

from flashsae import backend, fit
from flashsae.backend import backends, check_variables, describe, resolve_device, use_dense, use_kernels
from flashsae.errors import ConfigError


def test_the_reference_works_everywhere_and_the_others_say_why_not() -> None:
    triton, reference = backends()
    assert (triton.name, reference.name) == ("triton", "reference")
    assert reference.works
    assert triton.works == (torch.cuda.is_available() and importlib.util.find_spec("triton") is not None)
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
    assert torch.__version__.startswith(facts["torch"])  # some wheels leave +cu130 out of their metadata
    assert facts["flashsae"] == "0.1.0"
    assert "threads" in facts["cpu"]


def test_the_choice_of_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.zeros(1)
    assert not use_kernels(tensor)  # auto: not on the CPU
    monkeypatch.setenv("FLASHSAE_BACKEND", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert use_kernels(tensor)
    assert not use_kernels(tensor.double())
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ConfigError, match="FLASHSAE_BACKEND is triton, but the tensor is on cpu: move it to a CUDA"):
        use_kernels(tensor)
    monkeypatch.setenv("FLASHSAE_BACKEND", "reference")
    assert not use_kernels(tensor)
    monkeypatch.setenv("FLASHSAE_BACKEND", "cuda")
    with pytest.raises(ConfigError, match="FLASHSAE_BACKEND: expected auto, triton or reference, got 'cuda'"):
        use_kernels(tensor)


def test_the_choice_of_dense_products(monkeypatch: pytest.MonkeyPatch) -> None:
    W = torch.zeros(10, 1)
    assert use_dense(10, 10, W)
    assert not use_dense(1, 100_000, W)
    assert not use_dense(10, 10, W.double())  # no crossover was measured
    monkeypatch.setenv("FLASHSAE_DENSE_ABOVE", "1")
    assert not use_dense(10, 10, W)
    monkeypatch.setenv("FLASHSAE_DENSE_ABOVE", "0")
    assert use_dense(1, 100_000, W)


def test_variables_of_nonsense_are_told_at_once_and_where_they_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    W = torch.zeros(10, 1)
    check_variables()
    for value in ("x", "", "nan", "-1", "inf", "2", "1/16", "0,5"):
        monkeypatch.setenv("FLASHSAE_DENSE_ABOVE", value)
        for check in (check_variables, lambda: use_dense(1, 10, W), lambda: fit(W, d_sae=2, k=1)):
            with pytest.raises(
                ConfigError, match=r"^FLASHSAE_DENSE_ABOVE: expected a density from 0 to 1, got '.*'\.$"
            ):
                check()
    for value in ("0", "1", " 0.5", "1e-3"):
        monkeypatch.setenv("FLASHSAE_DENSE_ABOVE", value)
        check_variables()
    for value in ("", "cuda", "Triton"):
        monkeypatch.setenv("FLASHSAE_BACKEND", value)
        for check in (check_variables, lambda: use_kernels(W), lambda: use_kernels(W.double())):
            with pytest.raises(ConfigError, match=r"^FLASHSAE_BACKEND: expected auto, triton or reference, got '"):
                check()


def test_the_memory_of_this_machine_is_known_unless_its_system_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    there_is = backend.memory_bytes(torch.device("cpu"))
    assert there_is is not None
    assert there_is > 10**8

    def no_sysconf(name: str) -> int:
        raise ValueError("unrecognized configuration name")

    monkeypatch.setattr(backend.os, "sysconf", no_sysconf)
    assert backend.memory_bytes(torch.device("cpu")) is None


def test_cores_are_those_that_the_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5, 9}, raising=False)
    assert backend.cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert backend.cores() == 1
