"""The optimiser of a training."""

from __future__ import annotations

import torch

from flashsae.optim import FactoredAdam
from flashsae.precision import is_rounded
from flashsae.sae.module import SAE
from flashsae.train.config import TrainConfig


def build_optimizer(sae: SAE, config: TrainConfig) -> FactoredAdam:
    """Return the optimiser of a training; with products of bf16 numbers it splits the weights of `sae`."""
    optimizer = FactoredAdam(
        [
            {"params": [getattr(sae, name) for name in names], "unit_norm": unit_norm}
            for unit_norm, names in groups(sae).items()
        ],
        config.lr,
        betas=(config.betas[0], config.betas[1]),
        eps=config.eps,
        split_weights=is_rounded(config.precision),
        state_dtype=torch.bfloat16 if config.moments == "bf16" else torch.float32,
    )
    for group in optimizer.param_groups:
        group["lr"] = optimizer.param_groups[0]["lr"]  # one tensor, so one launch sets it
    return optimizer


def groups(sae: SAE) -> dict[bool, list[str]]:
    """Return the names of what is trained, in the order of the optimiser: with unit norm first, then the others."""
    trained = [row for row in sae.architecture.parameters if row.trained]
    names = {is_unit: [row.name for row in trained if row.unit_norm == is_unit] for is_unit in (True, False)}
    return {is_unit: there for is_unit, there in names.items() if there}
