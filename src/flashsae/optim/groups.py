"""What FactoredAdam accepts: settings of groups, parameters, and states of other optimisers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from flashsae.errors import CheckpointError, ConfigError, DtypeError, ShapeError
from flashsae.ops.validate import check_float


def check_group(group: dict[str, Any], *, new: bool = True) -> None:
    """Raise unless a group's settings are ones of this optimiser and, if it is new, its parameters can be optimised."""
    names = ("lr", "eps", "weight_decay")
    try:
        lr, eps, weight_decay = (float(group[name]) for name in names)
        beta1, beta2 = map(float, group["betas"])
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"lr, eps, weight_decay, betas: expected numbers, and two of them as betas, got "
            f"{', '.join(repr(group[name]) for name in (*names, 'betas'))}."
        ) from error
    if not (math.inf > lr >= 0 and eps >= 0 and weight_decay >= 0 and 0 <= beta1 < 1 and 0 <= beta2 < 1):
        raise ConfigError(
            "lr, eps, weight_decay: expected numbers that are not negative, and betas in [0, 1), got "
            f"{lr}, {eps}, {weight_decay} and {group['betas']}."
        )
    for name in ("unit_norm", "split_weights", "decoupled_weight_decay"):
        if not isinstance(group[name], bool):
            raise ConfigError(f"{name}: expected True or False, got {group[name]!r}.")
    for name in ("amsgrad", "maximize"):
        if group.get(name):
            raise ConfigError(f"{name}: FactoredAdam has no such form of Adam; use torch.optim.Adam for it.")
    if group["state_dtype"] not in (torch.float32, torch.bfloat16):
        raise ConfigError(f"state_dtype: expected torch.float32 or torch.bfloat16, got {group['state_dtype']}.")
    for parameter in group["params"] if new else ():
        check_float("params", parameter)
        if not parameter.is_contiguous():
            raise ShapeError(
                f"params: expected contiguous parameters, got one of shape {list(parameter.shape)} and strides "
                f"{list(parameter.stride())}. Set parameter.data = parameter.data.contiguous() first."
            )
        if group["split_weights"] and parameter.dim() == 2 and parameter.dtype != torch.float32:
            raise DtypeError(f"split_weights: expected float32 parameters, got {parameter.dtype}.")


def is_same_kind(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    """Tell whether a saved group is one of Adam as this one does it."""
    is_adam = "betas" in theirs and not theirs.get("amsgrad") and not theirs.get("maximize")
    return is_adam and all(theirs.get(name, ours[name]) == ours[name] for name in ("split_weights", "state_dtype"))


def fits(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    """Tell whether a saved state of a parameter can be taken over; an empty one is that before the first step."""
    if not theirs:
        return "low" not in ours
    return ours.keys() == theirs.keys() and all(
        (name == "step" and torch.as_tensor(theirs[name]).numel() == 1)
        or (tensor.shape, tensor.dtype) == (theirs[name].shape, theirs[name].dtype)
        for name, tensor in ours.items()
    )


def check_state(
    groups: Sequence[dict[str, Any]],
    loaded: Sequence[dict[str, Any]],
    ours: Sequence[dict[str, Any]],
    theirs: Sequence[dict[str, Any]],
) -> None:
    """Raise CheckpointError unless a saved state can be taken over.

    Args:
        groups, loaded: those that there are, and those that are saved.
        ours, theirs: the states of their parameters, in their order.
    """
    is_ours = (
        [len(g["params"]) for g in groups] == [len(g["params"]) for g in loaded]
        and all(fits(a, b) for a, b in zip(ours, theirs))
        and all(is_same_kind(a, b) for a, b in zip(groups, loaded))
    )
    if not is_ours:
        raise CheckpointError(
            "the state does not fit this optimiser: expected that of as many parameters of the same shapes, with "
            "the same split_weights and state_dtype. Build the optimiser as it was when the state was saved."
        )
