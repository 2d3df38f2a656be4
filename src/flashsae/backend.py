"""Which backends and devices exist on this machine, and why not. The only file that reads environment variables."""

from __future__ import annotations

import importlib.util
import os
import platform
from dataclasses import dataclass
from importlib import metadata

import torch

from flashsae.errors import ConfigError


@dataclass(frozen=True)
class Backend:
    """One way to run the operations of `flashsae.ops`.

    Args:
        name: "reference" (PyTorch, any device) or "triton" (kernels for a CUDA device).
        works: whether it can run here.
        reason: why, or why not; one clause.
    """

    name: str
    works: bool
    reason: str


def backends() -> tuple[Backend, ...]:
    """Return every backend there is, the preferred one first."""
    return (_triton(), Backend("reference", True, "PyTorch operations on any device"))


def _triton() -> Backend:
    if importlib.util.find_spec("triton") is None:
        return Backend("triton", False, "the package triton is not installed")
    if not torch.cuda.is_available():
        return Backend("triton", False, "there is no CUDA device")
    return Backend("triton", False, "this version of FlashSAE carries no Triton kernels yet")


def resolve_device(device: str = "auto") -> torch.device:
    """Return the device to train on.

    Args:
        device: "auto" takes FLASHSAE_DEVICE if it is set, else the first CUDA device, else the CPU; anything else
            is a torch device and must exist.
    Raises:
        ConfigError: no such device here.
    """
    name = os.environ.get("FLASHSAE_DEVICE", "auto") if device == "auto" else device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        resolved = torch.device(name)
        torch.empty(0, device=resolved)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"device: expected auto, cpu or a CUDA device that exists, got {name!r} ({reason})."
        ) from error
    return resolved


def describe() -> dict[str, str]:
    """Return what `flashsae doctor` prints of the machine: versions, devices and threads by name."""
    facts = {
        "flashsae": _version("flashsae"),
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
    for package in (
        "torch",
        "triton",
        "transformers",
        "datasets",
        "matplotlib",
        "jinja2",
        "tensorboard",
        "wandb",
    ):
        facts[package] = _version(package)
    facts["cpu"] = f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads"
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        facts[f"cuda:{number}"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    if not torch.cuda.is_available():
        facts["cuda"] = "no device" if torch.version.cuda else "no device (this torch is a CPU build)"
    return facts


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
