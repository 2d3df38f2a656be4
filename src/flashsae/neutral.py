"""Trainings and measurements do not depend on what their caller has set for all of PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def neutral() -> Iterator[None]:
    """Run the body, or a decorated function, as in a fresh process: then put the caller's settings back.

    Autocast, default dtype and device, inference and gradient mode, deterministic mode and the precision of float32
    products are those that PyTorch starts with; the number of threads stays. Results here repeat by themselves, so
    deterministic mode would only forbid operations.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        stack.enter_context(_default_dtype())
        stack.enter_context(_repeatable_as_it_is())
        stack.enter_context(_whole_products())
        yield


@contextmanager
def _default_dtype() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _repeatable_as_it_is() -> Iterator[None]:
    is_on = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(is_on, warn_only=warns)


@contextmanager
def _whole_products() -> Iterator[None]:
    """Compute float32 products in float32; what "tf32" and "bf16" ask for, operations switch on by themselves."""
    products = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = [each.fp32_precision for each in products]
    for each, kind in zip(products, before):
        if kind != "none":
            each.fp32_precision = "ieee"
    try:
        yield
    finally:
        for each, kind in zip(products, before):
            if kind != "none":
                each.fp32_precision = kind
