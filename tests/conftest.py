"""Shapes and types of the public functions are checked at run time in tests, and only there."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may depend on a hub

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported: kernels run on the CPU

WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if WORKERS > 1:  # they share the cores: more threads than these only wait for each other
    torch.set_num_threads(max(1, torch.get_num_threads() // WORKERS))
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))  # of the processes that tests start

from jaxtyping import install_import_hook

# the public operations check shapes themselves, with better messages; what they call relies on these annotations
OPERATIONS = "encode", "select", "decode", "latent_rows", "adam_rows"
REFERENCES = [f"flashsae.ops.{op}.reference" for op in OPERATIONS]
install_import_hook(
    [
        *REFERENCES,
        "flashsae.sae.losses",
        "flashsae.metrics.variance",
        "flashsae.metrics.activity",
        "flashsae.sae.dead",
    ],
    "beartype.beartype",
)

from types import ModuleType

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="there is no CUDA device"))
    if WORKERS > 1:  # the long ones first, so that no worker is left alone with one in the end
        items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True)
def _architectures_of_others_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no test find what another one registered."""
    from flashsae.architecture import description

    monkeypatch.setattr(description, "_REGISTERED", dict(description._REGISTERED))


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def tiny() -> ModuleType:
    """Tiny language models and what reads them."""
    from helpers import tiny_models

    return tiny_models
