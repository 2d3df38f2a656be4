"""A checkpoint as an SAE, to look at a training before its end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from flashsae.backend import resolve_device
from flashsae.data.acts import Batch
from flashsae.data.batches import OnFill, State
from flashsae.errors import CheckpointError, ConfigError, FlashSAEError
from flashsae.neutral import neutral
from flashsae.sae.config import SAEConfig
from flashsae.sae.dead import DeadLatents
from flashsae.sae.module import SAE
from flashsae.settings.kinds import expand
from flashsae.train.average import average_of
from flashsae.train.checkpoint import Checkpoint, list_checkpoints
from flashsae.train.checkpoint import load_checkpoint as read_checkpoint
from flashsae.train.config import TrainConfig
from flashsae.train.optimizer import build_optimizer
from flashsae.train.scaling import Scaling
from flashsae.train.state import TrainState, part_of, progress_at, restore

_CHECKPOINTS = "checkpoints"


@neutral()
def load_checkpoint(path: str | Path, *, device: torch.device | str = "cpu") -> SAE:
    """Read the SAE of a checkpoint, as it would be if the training had ended there; it is in `eval()` mode.

    Where weights are averaged and that has begun, they are the average so far.

    Args:
        path: of a checkpoint, such as RUN/checkpoints/step-00001000; of RUN/checkpoints or RUN, for the newest.
        device: of the SAE.
    Raises:
        CheckpointError: there is none, or it is damaged, or of an architecture that is not registered here.
        ConfigError: no such device here, or path is no path.
    """
    target = resolve_device(str(device))
    checkpoint = read_checkpoint(_folder(expand(path, "path")))
    config = _config_of(checkpoint)
    sae = SAE(SAEConfig.of(config), seed=None)
    sae.set_progress(progress_at(checkpoint.step, config))
    dead = DeadLatents(config.d_sae, config.dead_after_tokens, torch.device("cpu"))
    scaling = Scaling.uniform(1.0, config.d_in, config.d_out)
    state = TrainState(sae, build_optimizer(sae, config), dead, _NoBatches(), scaling)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        restore(state, checkpoint, knows_start=False)
    state.average = average_of(sae, checkpoint.step, config, part_of(checkpoint, "average."))
    return state.finished_sae().to(target).eval()


def _folder(path: Path) -> Path:
    """Return the folder of a checkpoint: this one, or the newest in it."""
    for folder in (path, path / _CHECKPOINTS):
        found = list_checkpoints(folder)
        if found:
            return found[-1]
    if not path.name.startswith("step-"):
        raise CheckpointError(f"{path} holds no checkpoint: expected a folder step-..., or one of a run with such.")
    return path


def _config_of(checkpoint: Checkpoint) -> TrainConfig:
    where = f"the checkpoint of step {checkpoint.step}"
    saved: Any = checkpoint.state.get("config")
    if not isinstance(saved, dict):
        raise CheckpointError(f"{where} holds no SAE, but the place in the data of several; name that of one of them.")
    try:
        config = TrainConfig(**saved)
    except (FlashSAEError, TypeError) as error:
        raise CheckpointError(f"{where} cannot be read here: {error}") from error
    if None in (config.d_in, config.d_sae, config.d_out, config.dead_after_tokens, config.lr, config.decay_fraction):
        raise CheckpointError(f"{where} is damaged: its settings are not worked out.")
    return config


class _NoBatches:
    """Batches of which there are none: a checkpoint is read, and nothing is trained."""

    epoch_tokens = None

    def next_batch(self) -> Batch:
        raise ConfigError("a checkpoint that was read as an SAE has no batches.")

    def sample(self, tokens: int, on_fill: OnFill | None = None) -> Batch:
        return self.next_batch()

    def state(self) -> State:
        return {}, {}

    def restore(self, state: State) -> None:
        pass
