"""Checkpoints of a training run: folders that are whole, verified by checksums, and found again by their step."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from flashsae import files
from flashsae.errors import CheckpointError

FORMAT = "flashsae.checkpoint"
FORMAT_VERSION = 3
_MANIFEST = "manifest.json"
_TENSORS = "tensors.safetensors"
_STATE = "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """What a run needs to go on.

    Args:
        step: steps done.
        state: the part that JSON holds.
        tensors: the rest.
    """

    step: int
    state: dict[str, Any]
    tensors: dict[str, Tensor]


def save_checkpoint(directory: Path, checkpoint: Checkpoint, *, keep: int = 1) -> Path:
    """Write a checkpoint; older ones are removed only after it is in place.

    Args:
        directory: of all checkpoints of the run; made if need be.
        checkpoint: what to write.
        keep: how many to keep, the newest ones.
    Returns:
        its folder, `directory`/step-00001000.
    Raises:
        StorageError: the file system refused; the checkpoints that were there are intact.
    """
    path = directory / f"step-{checkpoint.step:08d}"
    with files.atomic_directory(path, overwrite=True) as folder:
        files.save_tensors(folder / _TENSORS, checkpoint.tensors)
        (folder / _STATE).write_text(json.dumps(checkpoint.state), "utf-8")
        manifest = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "step": checkpoint.step,
            "sha256": {name: files.sha256(folder / name) for name in (_TENSORS, _STATE)},
        }
        (folder / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", "utf-8")
    for old in list_checkpoints(directory)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    _remove_partial(directory)
    return path


def list_checkpoints(directory: Path) -> list[Path]:
    """Return the checkpoint folders of a run, oldest first."""
    return sorted(path for path in directory.glob("step-*") if path.is_dir() and path.name[5:].isdigit())


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint and verify every byte.

    Raises:
        CheckpointError: it is damaged, foreign, or of another format version.
    """
    manifest = files.load_manifest(path / _MANIFEST, FORMAT, FORMAT_VERSION)
    sums = manifest.get("sha256", {})
    for name in (_TENSORS, _STATE):
        if not (path / name).exists() or sums.get(name) != files.sha256(path / name):
            raise CheckpointError(
                f"{path / name} is damaged: its checksum is not the one in {_MANIFEST}. "
                f"Remove the folder {path.name} to go on from an older checkpoint or from the start."
            )
    return Checkpoint(int(path.name[5:]), files.load_json(path / _STATE), files.load_tensors(path / _TENSORS))


def _remove_partial(directory: Path) -> None:
    """Remove what a kill in the middle of writing left behind."""
    for partial in (*directory.glob(".step-*.partial"), *directory.glob(".step-*.old")):
        shutil.rmtree(partial, ignore_errors=True)
