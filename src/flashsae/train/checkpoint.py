"""Checkpoints of a training run: folders that are whole, verified by checksums, and found again by their step."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from flashsae.errors import CheckpointError
from flashsae.files import atomic
from flashsae.files.documents import load_document, load_json, load_tensors, sealed
from flashsae.files.reading import check_sha256, sha256
from flashsae.files.schema import Count

FORMAT = "flashsae.checkpoint"
FORMAT_VERSION = 5
"""Version 4 had one scale for all sites; it is still read."""
KEPT = 2
"""Checkpoints that a run keeps: the newest, and the one before it in case that one is damaged."""
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


@dataclass(frozen=True)
class _Manifest:
    step: Count
    sha256: dict[str, str]


def save_checkpoint(directory: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint beside the newest that is there; older ones are removed first, to make room for it.

    Args:
        directory: of all checkpoints of the run; made if need be. The caller holds the lock of the run.
        checkpoint: what to write.
    Returns:
        its folder, `directory`/step-00001000.
    Raises:
        StorageError: the file system refused; the newest checkpoint that was there is intact.
    """
    path = directory / f"step-{checkpoint.step:08d}"
    if directory.is_dir():
        atomic.clear_leftovers(directory)
    for old in [other for other in list_checkpoints(directory) if other != path][: 1 - KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    with atomic.atomic_directory(path, overwrite=True) as folder:
        atomic.save_tensors(folder / _TENSORS, checkpoint.tensors)
        (folder / _STATE).write_text(json.dumps(checkpoint.state), "utf-8")
        manifest = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "step": checkpoint.step,
            "sha256": {name: sha256(folder / name) for name in (_TENSORS, _STATE)},
        }
        (folder / _MANIFEST).write_text(json.dumps(sealed(manifest), indent=2) + "\n", "utf-8")
    return path


def list_checkpoints(directory: Path) -> list[Path]:
    """Return the checkpoint folders of a run, oldest first."""
    found = [path for path in directory.glob("step-*") if path.is_dir() and path.name[5:].isdecimal()]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """Return the step that the folder of a checkpoint is named after."""
    return int(path.name[5:])


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint and verify every byte.

    Raises:
        CheckpointError: it is damaged, foreign, renamed, or of another format version.
    """
    older = [other.name for other in list_checkpoints(path.parent) if step_of(other) < step_of(path)]
    back = f"from {older[-1]}" if older else "from the start"
    advice = f"Remove the folder {path.name} to go on {back}."
    content = load_json(path / _MANIFEST, advice)
    version = 4 if isinstance(content, dict) and content.get("format_version") == 4 else FORMAT_VERSION
    manifest = load_document(path / _MANIFEST, _Manifest, head=(FORMAT, version), must_be_sealed=True, advice=advice)
    if manifest.step != step_of(path):
        raise CheckpointError(
            f"{path} holds the checkpoint of step {manifest.step}: it was renamed. Give it its name "
            f"step-{manifest.step:08d} back, or remove it."
        )
    for name in (_TENSORS, _STATE):
        check_sha256(path / name, manifest.sha256.get(name), _MANIFEST, advice)
    state = load_document(path / _STATE, dict[str, Any], advice=advice)
    return Checkpoint(manifest.step, state, load_tensors(path / _TENSORS))
