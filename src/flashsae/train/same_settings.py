"""Whether a training is resumed with the settings that it had."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flashsae.errors import CheckpointError
from flashsae.settings.kinds import as_json
from flashsae.settings.left_open import default_values
from flashsae.train.checkpoint import Checkpoint
from flashsae.train.config import TrainConfig

FREE_TO_CHANGE = ("device", "log_every_steps", "evaluate_every_steps", "checkpoint_every_steps")
"""Settings that decide no byte of the result."""


def check_settings(config: TrainConfig, checkpoint: Checkpoint) -> None:
    """Raise CheckpointError if a checkpoint was written with other settings; names each with both values."""
    if "config" not in checkpoint.state and "saes" in checkpoint.state:
        raise CheckpointError(
            f"the checkpoint of step {checkpoint.step} is of several SAEs, which go on together: resume with what "
            "began them, fit_many with all their settings, or flashsae train --resume."
        )
    saved = checkpoint.state.get("config")
    saved = saved if isinstance(saved, dict) else {}
    # what it says nothing of was written by a version that had no such setting
    later = as_json({**default_values(config.arch), **default_values(config)})
    now = as_json(config.flat())
    may_change = (*FREE_TO_CHANGE, *(_ENDS if _is_extension(saved, now) else ()))
    differences = [
        f"{name} was {saved.get(name, later.get(name))!r} and is {value!r} now"
        for name, value in now.items()
        if name not in may_change and saved.get(name, later.get(name)) != value
    ]
    if differences:
        raise CheckpointError(
            f"the checkpoint of step {checkpoint.step} does not fit these settings: {'; '.join(differences)}. Resume "
            "with the settings of the run, or start a new one."
        )
    if checkpoint.step > config.steps:
        raise CheckpointError(
            f"the checkpoint of step {checkpoint.step} is behind the end of this training, which has {config.steps} "
            "steps. Remove it, or resume with the settings of the run."
        )


_ENDS = ("tokens", "extended")


def _is_extension(saved: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Tell whether a training goes on behind the end that it had."""
    extended, ends = saved.get("extended", []), [*now["extended"], now["tokens"]]
    return isinstance(extended, list) and [*extended, saved.get("tokens")] == ends[: len(extended) + 1]
