"""What a training will need, worked out before it starts."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from flashsae.ops.encode_topk.reference import WORKSPACE_BYTES
from flashsae.train.config import ResolvedConfig

_PROCESS_BYTES = 700 << 20  # Python, torch, transformers and a small model, in the memory of the host


@dataclass(frozen=True)
class Plan:
    """The size of a training.

    Args:
        parameters: of the SAE.
        steps: of Adam.
        peak_bytes: estimate of the largest memory in use while training, on `device`; without the language model.
    """

    parameters: int
    steps: int
    peak_bytes: int


def make_plan(config: ResolvedConfig, device: torch.device, data_bytes: int = 0) -> Plan:
    """Work out the size of a training.

    Args:
        config: settings.
        device: of the training.
        data_bytes: of the shuffle buffer, if there is one; pages of a cache belong to the system, which may drop them.
    """
    matrix = 4 * config.d_sae * config.d_in
    weights, gradients, moments = 2 * matrix, 2 * matrix, 4 * matrix
    projection = matrix  # grad · W_dec while the decoder's gradient is projected
    workspace = min(WORKSPACE_BYTES, 12 * config.batch_tokens * config.d_sae)
    batch = 4 * config.batch_tokens * (8 * config.d_in + 8 * config.k)
    base = _PROCESS_BYTES if device.type == "cpu" else 0
    peak = base + weights + gradients + moments + max(projection, workspace) + batch + data_bytes
    return Plan(2 * config.d_sae * config.d_in + config.d_sae + config.d_in, config.steps, peak)
