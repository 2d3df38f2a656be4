"""What a training will need, worked out before it starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch

from flashsae.architecture import architecture_of
from flashsae.architecture.parts import Progress
from flashsae.backend import memory_bytes
from flashsae.errors import ConfigError
from flashsae.ops.encode.reference import WORKSPACE_BYTES
from flashsae.precision import has_screen, is_rounded, operand_of
from flashsae.sae.config import SAEConfig
from flashsae.train.config import TrainConfig

MOST_REPEATS = 100
"""A run that trains more often on each token warns: it learns these tokens, and not what others like them are."""

_KEPT = ("weights", "moments of Adam", "averaged weights", "shuffle buffer")
_SCREEN_BLOCK = 128  # a row in int8 is padded to a multiple of it
_CUBLAS_BYTES = 32 << 20  # workspace of its products
_PROCESS_BYTES = 700 << 20  # Python, torch, transformers and a small model, in the memory of the host


@dataclass(frozen=True)
class Plan:
    """The size of a training.

    Args:
        parameters: of the SAE.
        steps: of Adam.
        peak_bytes: estimate of the largest memory in use while training, on `device`.
        parts: what it is made of, in bytes by name.
        kept_bytes: of these, what is there from the first step to the last: weights, moments and a shuffle buffer.
    """

    parameters: int
    steps: int
    peak_bytes: int
    parts: dict[str, int]
    kept_bytes: int


def make_plan(config: TrainConfig, device: torch.device, buffer_bytes: int = 0, model_bytes: int = 0) -> Plan:
    """Work out the size of a training.

    Args:
        config: settings.
        device: of the training.
        buffer_bytes: of the shuffle buffer, if there is one; pages of a cache the system may drop at will.
        model_bytes: of a language model that runs beside the training; what it needs to run comes on top.
    Raises:
        ConfigError: settings of the architecture do not fit the sizes.
    """
    schedule = architecture_of(config.arch).schedule
    if schedule is not None:  # asked for its first numbers, it refuses what does not fit, such as prefixes above d_sae
        sae = SAEConfig.of(config)
        schedule(sae, Progress(0, config.steps, config.seed))
    sizes = {"d_in": config.d_in, "d_out": config.d_out, "d_sae": config.d_sae}
    shapes = [row.sizes(sizes) for row in architecture_of(config.arch).parameters if row.trained]
    matrices, biases = (sum(prod(shape) for shape in shapes if (len(shape) == 2) == is_2d) for is_2d in (True, False))
    parts = {
        "weights": 4 * (matrices + biases),
        "moments of Adam": (4 if config.moments == "bf16" else 8) * matrices + 8 * biases,
        **({"averaged weights": 4 * (matrices + biases)} if config.average_tokens else {}),
        "one step": _gpu_step(config) if device.type == "cuda" else _cpu_step(config),
    }
    if device.type == "cuda":
        parts["batches on their way"] = 2 * 2 * config.batch_tokens * config.d_in
    else:
        parts["Python and libraries"] = _PROCESS_BYTES
    if buffer_bytes:
        parts["shuffle buffer"] = buffer_bytes
    if model_bytes:
        parts["language model"] = model_bytes
    kept = sum(parts.get(name, 0) for name in _KEPT)
    return Plan(matrices + biases, config.steps, sum(parts.values()), parts, kept)


def plan_together(plans: Sequence[Plan], device: torch.device, buffer_bytes: int = 0, model_bytes: int = 0) -> Plan:
    """Work out the size of several trainings side by side: all SAEs and their moments are in memory.

    Args:
        plans: of each, without a buffer and a language model.
        device: of all.
        buffer_bytes: of the shuffle buffers.
        model_bytes: of a language model that runs beside them.
    """
    parts = {name: sum(plan.parts.get(name, 0) for plan in plans) for name in _KEPT}
    parts = {name: size for name, size in parts.items() if size}
    steps = [plan.parts["one step"] for plan in plans]
    parts["one step"] = sum(steps) if device.type == "cuda" else max(steps)  # a captured step keeps its memory
    for name in ("batches on their way", "Python and libraries"):
        if name in plans[0].parts:
            parts[name] = max(plan.parts[name] for plan in plans)
    parts |= {"shuffle buffer": buffer_bytes} if buffer_bytes else {}
    parts |= {"language model": model_bytes} if model_bytes else {}
    kept = sum(parts.get(name, 0) for name in _KEPT)
    return Plan(sum(plan.parameters for plan in plans), plans[0].steps, sum(parts.values()), parts, kept)


def at_once(plans: Sequence[Plan], device: torch.device) -> int | None:
    """Return how many of several SAEs fit into memory side by side, in rounds of as many in their order; None if all.

    At least 1: of one that does not fit, `check_memory` tells.
    """
    there_is = memory_bytes(device)
    for count in range(len(plans), 1, -1):
        rounds = [plan_together(plans[start : start + count], device) for start in range(0, len(plans), count)]
        if there_is is None or max(each.peak_bytes for each in rounds) <= 0.9 * there_is:
            return None if count == len(plans) else count
    return 1 if len(plans) > 1 else None


def check_memory(plan: Plan, device: torch.device) -> str:
    """Return a warning if a training may not fit, else "".

    Args:
        plan: its size.
        device: to train on.
    Raises:
        ConfigError: it cannot fit.
    """
    there_is = memory_bytes(device)
    if there_is is None:
        return ""
    if plan.kept_bytes > there_is:
        name = "shuffle_tokens" if 2 * plan.parts.get("shuffle buffer", 0) > plan.kept_bytes else "d_sae"
        raise ConfigError(
            f"{name}: a training of this size keeps {plan.kept_bytes / 1e9:,.1f} GB from step to step, and {device} "
            f"has {there_is / 1e9:,.1f} GB in all. Take a smaller d_sae or shuffle_tokens, or bf16 moments."
        )
    if plan.peak_bytes > 0.9 * there_is:
        return f"; may not fit, since {device} has {there_is / 1e9:.2f} GB in all"
    return ""


def repeats_warning(tokens: int, rows: int) -> str:
    """Return a sentence if a training repeats its data more than 100 times, else "".

    Args:
        tokens: to train on.
        rows: tokens that there are.
    """
    if tokens <= MOST_REPEATS * rows:
        return ""
    return (
        f"there are {rows:,} tokens to train on, so each comes about {tokens / rows:,.0f} times in {tokens:,}: the SAE "
        f"will fit these and little else. Give more data, or set tokens to {10 * rows:,} or so; a few passes teach "
        "most of what there is."
    )


def _gpu_step(config: TrainConfig) -> int:
    """Return the largest sum of what is alive at once within a step.

    That is either while the last rows of pre-activations are searched, or, with float32 weights, somewhat later.
    """
    n, d, B, k = config.d_sae, config.d_in, config.batch_tokens, _active(config)
    operand, is_screened = operand_of(config.precision), _is_screened(config)
    width = 4 if operand == "tf32" else 2
    centred = width if operand != "float32" else 4 if is_screened else 6
    tokens = B * d * (2 + 4 + centred)  # as they come, whole, centred
    code = max(B * k * (4 + 8 + 8 + 4 + 4 + 4), _full_code(config))
    rows = min(B, max(1, WORKSPACE_BYTES // (n * width)))
    workspace = rows * n * width * (1 + 1 / 16)
    rounded = 2 * n * d if operand == "float32" else 0  # weights in float16
    if is_screened:  # where that pays: rows in int8 of weights and of a workspace, and what each token may select
        padded = -(-d // _SCREEN_BLOCK) * _SCREEN_BLOCK
        rounded = max(rounded, n * (padded + 12) + rows * (padded + 24) + _listed(B, k))  # and 3 or 6 facts of each
    workspace += rounded
    error = B * config.d_out * (2 if is_rounded(config.precision) else 4)
    levels = _levels(config)
    errors = error * (2 + (levels + 2 if levels > 1 else 0))  # reconstruction, residual, and rows of levels
    dead = 0.05 * n if config.auxk_alpha else 0  # a guess: how many latents will be dead
    auxk = dead * d * 2 * 2 * 2 + 3 * B * dead * 2
    return int(tokens + code + max(workspace, errors + auxk) + 32 * n + _CUBLAS_BYTES)


def _active(config: TrainConfig) -> float:
    """Return how many latents of a token codes are expected to have, at most."""
    architecture = architecture_of(config.arch)
    most = 0 if architecture.most is None else architecture.most(config.arch)
    return max(architecture.l0(config.arch), most)


def _is_screened(config: TrainConfig) -> bool:
    """Tell whether there may be a screen: what is selected over a batch, or above a threshold, has none."""
    return has_screen(config.precision) and architecture_of(config.arch).most is not None


def _listed(B: int, k: float) -> int:
    """Return the memory of lists of latents that a screen leaves: number, bound, place and value of each."""
    return 16 * min(B, 8192) * max(512, 4 * (1 << max(0, int(k) - 1).bit_length()))


def _levels(config: TrainConfig) -> int:
    """Return how many nested reconstructions there are."""
    count = architecture_of(config.arch).level_count
    return 1 if count is None else count(config.arch)


def _full_code(config: TrainConfig) -> int:
    """Return the memory of a code above a threshold while it is dense, as most are at the start; 0 for others.

    Pre-activations, values and gradients of both are alive at once, and those of the loss by them for a moment.
    """
    return 20 * config.batch_tokens * config.d_sae if architecture_of(config.arch).varies else 0


def _cpu_step(config: TrainConfig) -> int:
    """Return the same where the gradient of a matrix is whole, one matrix at a time."""
    n, d, B, levels = config.d_sae, config.d_in, config.batch_tokens, _levels(config)
    nested = 16 * B * levels * config.d_out if levels > 1 else 0
    workspace = max(min(WORKSPACE_BYTES, 12 * B * n), _full_code(config))
    return int(max(16 * n * d, workspace) + nested + 4 * B * (8 * d + 8 * _active(config)))
