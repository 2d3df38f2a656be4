"""Shapes and types of the public functions are checked at run time in tests, and only there."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may depend on a hub

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported: kernels run on the CPU

from jaxtyping import install_import_hook

# the public operations check shapes themselves, with better messages; what they call relies on these annotations
OPERATIONS = "encode_topk", "decode_sparse", "latent_rows", "adam_rows", "variance"
REFERENCES = [f"flashsae.ops.{op}.reference" for op in OPERATIONS]
install_import_hook([*REFERENCES, "flashsae.nn.losses", "flashsae.metrics", "flashsae.train.dead"], "beartype.beartype")

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="there is no CUDA device"))


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
