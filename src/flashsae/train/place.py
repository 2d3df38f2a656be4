"""The place in the data of several SAEs that train side by side, and the step that all of them go on from."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashsae.data.batches import Batches
from flashsae.errors import CheckpointError
from flashsae.files import atomic
from flashsae.files.schema import parse
from flashsae.train.checkpoint import Checkpoint, list_checkpoints, load_checkpoint, save_checkpoint, step_of

_ADVICE = "Resume with the settings and the data of the run, or start a new one."


@dataclass(frozen=True)
class _Saved:
    """The part of a checkpoint of the place that JSON holds."""

    data: dict[str, Any]
    saes: list[str]


class Place:
    """Saves where several SAEs are in their data, and lets them go on from one step.

    At a checkpoint the place is written first, then the state of each SAE into its own folder. Each folder keeps two,
    so that whenever a kill comes, there is a step that all have: the newest such is gone on from, and what some have of
    later steps is removed.

    Args:
        folder: of the checkpoints of the place.
        batches: of all.
        saes: the folder of the checkpoints of each SAE, by its name.
        failed: names of those that do not go on.
    """

    def __init__(self, folder: Path, batches: Batches, saes: Mapping[str, Path], failed: Collection[str] = ()) -> None:
        self._folder, self._batches, self._names = folder, batches, sorted(saes)
        self._saes = [path for name, path in saes.items() if name not in failed]

    def save(self, step: int) -> None:
        """Write the place behind a step.

        Raises:
            StorageError: the file system refused.
        """
        place, tensors = self._batches.state()
        save_checkpoint(self._folder, Checkpoint(step, {"data": place, "saes": self._names}, tensors))

    def resume(self) -> int:
        """Put the batches where the newest step is that all SAEs have, and return it; 0 if there is none.

        Raises:
            CheckpointError: a checkpoint is damaged, or of other SAEs or other data.
        """
        found = list_checkpoints(self._folder)
        if not found and any(map(list_checkpoints, self._saes)):
            raise CheckpointError(
                f"{self._folder} is missing, which says where the SAEs beside it were in their data. Put it back, or "
                "start a new run."
            )
        steps = set(map(step_of, found)).intersection(*(map(step_of, list_checkpoints(sae)) for sae in self._saes))
        step = max(steps, default=0)
        for path in found[-1:] if not step else [path for path in found if step_of(path) == step]:
            checkpoint = load_checkpoint(path)
            if "saes" not in checkpoint.state and "config" in checkpoint.state:
                raise CheckpointError(
                    f"{self._folder.parent} was begun with one SAE alone, and is asked to go on with "
                    f"{', '.join(self._names)}. {_ADVICE}"
                )
            saved = parse(_Saved, checkpoint.state, f"the checkpoint of step {checkpoint.step}", _ADVICE)
            if saved.saes != self._names:
                raise CheckpointError(
                    f"{self._folder.parent} was begun with the SAEs {', '.join(saved.saes)}, and is asked to go on "
                    f"with {', '.join(self._names)}. {_ADVICE}"
                )
            if step:
                self._batches.restore((saved.data, checkpoint.tensors))
        if not step and len(found) > 1:
            raise CheckpointError(
                f"{self._folder.parent} has no checkpoint of one step for all of its SAEs: expected step "
                f"{step_of(found[0])} in each of {', '.join(map(str, self._saes))}. Put back what was removed, "
                "or start a new run."
            )
        for folder in (*self._saes, self._folder):
            for path in list_checkpoints(folder):
                if step_of(path) > step:
                    with atomic.storage_errors(path):
                        shutil.rmtree(path)
        return step
