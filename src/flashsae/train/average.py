"""Weights averaged over the last steps of a training, beside those that are trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from flashsae.errors import CheckpointError
from flashsae.sae.module import SAE
from flashsae.train.config import TrainConfig
from flashsae.train.optimizer import groups

if TYPE_CHECKING:
    from flashsae.train.state import TrainState

Average = dict[str, Tensor]
"""The mean of each trained parameter over the steps so far that count, float32, by name; empty where none does."""


def steps_averaged(step: int, config: TrainConfig) -> int:
    """Return how many of the first `step` steps count: those on the last tokens of a training, or of its extension."""
    begin, end = config.stage(step - 1)
    window = min(-(-config.average_tokens // config.batch_tokens), end - begin)
    return max(0, step - (end - window))


@torch.no_grad()
def average(state: TrainState, config: TrainConfig) -> None:
    """Let the weights behind a step count, where it is among the last ones; nothing waits for the device.

        mean ← mean + (weights − mean) / n, in float32, after the n-th of the steps that count

    Args:
        state: behind the step; its `average` is changed in place.
        config: settings.
    Numerics: the same bits killed and resumed or not. Weights that are split are averaged with all their bits.
    """
    count = steps_averaged(state.step, config) if config.average_tokens else 0
    if count == 0:
        state.average.clear()
        return
    for name in _names(state.sae):
        parameter = getattr(state.sae, name)
        if count == 1:
            state.average[name] = torch.empty(parameter.shape, dtype=torch.float32, device=parameter.device)
        start = 0
        for rows in state.optimizer.whole_rows(parameter):
            mean = state.average[name][start : start + len(rows)]
            if count == 1:
                mean.copy_(rows)
            else:
                mean.lerp_(rows.float(), 1 / count)
            start += len(rows)


def averaged(state: TrainState) -> dict[str, Tensor]:
    """Return the mean of each trained parameter, rows that keep norm 1 scaled to it again; {} where there is none."""
    is_unit = {row.name: row.unit_norm for row in state.sae.architecture.parameters}
    return {name: F.normalize(mean, dim=1) if is_unit[name] else mean for name, mean in state.average.items()}


def average_of(sae: SAE, step: int, config: TrainConfig, saved: Mapping[str, Tensor]) -> Average:
    """Return the average that a checkpoint holds.

    Args:
        sae: in training.
        step: of the checkpoint.
        config: settings.
        saved: its tensors, by name.
    Raises:
        CheckpointError: it holds another one than its step has.
    """
    names = _names(sae) if config.average_tokens and steps_averaged(step, config) else []
    like = {name: getattr(sae, name) for name in names}
    shapes = {name: list(tensor.shape) for name, tensor in saved.items()}
    if names and shapes != {name: list(parameter.shape) for name, parameter in like.items()}:
        raise CheckpointError(
            f"the checkpoint of step {step} is damaged: it lacks the average of the weights. Remove its folder to go "
            "on from the one before, or start a new run."
        )
    return {name: saved[name].to(parameter.device, torch.float32) for name, parameter in like.items()}


def _names(sae: SAE) -> list[str]:
    return [name for names in groups(sae).values() for name in names]
