"""The same function on the kernels and on the reference, and what T0 asks of both."""

from __future__ import annotations

import os
from collections.abc import Callable
from unittest.mock import patch

import torch

from flashsae.testing import poison_empty
from helpers.steps import Tensors

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def on_reference(function: Callable[[Tensors], Tensors], inputs: Tensors) -> Tensors:
    with patch.dict(os.environ, {"FLASHSAE_BACKEND": "reference"}):
        return function({name: tensor.cpu() for name, tensor in inputs.items()})


def on_kernels(function: Callable[[Tensors], Tensors], inputs: Tensors) -> Tensors:
    with patch.dict(os.environ, {"FLASHSAE_BACKEND": "triton"}), poison_empty():
        results = function({name: tensor.to(DEVICE) for name, tensor in inputs.items()})
    return {name: tensor.cpu() for name, tensor in results.items()}


def as_float64(inputs: Tensors) -> Tensors:
    return {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}


def assert_same(ours: Tensors, theirs: Tensors, exact: Tensors) -> None:
    """Assert bitwise equality of kernels and reference, and with the truth in float64."""
    assert set(ours) == set(theirs) == set(exact)
    for name, truth in exact.items():
        assert torch.equal(truth.to(ours[name].dtype).double(), truth.double()), f"{name} rounds: choose smaller inputs"
        assert torch.equal(ours[name].double(), truth.double()), f"{name}: kernels differ from the dense float64"
        assert torch.equal(theirs[name].double(), truth.double()), f"{name}: reference differs from the dense float64"
        assert ours[name].dtype == theirs[name].dtype, name
