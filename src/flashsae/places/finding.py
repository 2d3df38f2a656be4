"""SAEs of any format, from wherever they are: a folder, a file, a run, the hub."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from flashsae.backend import resolve_device
from flashsae.errors import CheckpointError, ConfigError, StorageError
from flashsae.files import atomic
from flashsae.formats.content import Content, Format
from flashsae.formats.native import FORMAT as OURS
from flashsae.formats.native import is_sae
from flashsae.formats.registry import format_named, formats, recognised
from flashsae.places.hub import SCHEME, fetched
from flashsae.sae.module import SAE
from flashsae.sae.saved import sae_of
from flashsae.sae.stored import check_numbers
from flashsae.settings.kinds import expand

_OF_A_RUN = "sae"
_SHOWN = 8


def load(
    place: str | Path,
    *,
    format: str | None = None,
    device: torch.device | str = "cpu",
    revision: str | None = None,
    token: str | None = None,
) -> SAE:
    """Read an SAE of any format that there is (docs/interop.md); it is in `eval()` mode.

    Args:
        place: a folder or file, the folder of a run that made it, or hf://OWNER/NAME/FOLDER on the hub. One of several
            in a folder is named behind it, as the message lists them: FOLDER/layer_3.
        format: the name of its format, where a place may be of several.
        device: of the SAE.
        revision: branch, tag or commit on the hub.
        token: for a private repository on the hub, where none is stored by its own tools.
    Raises:
        CheckpointError: there is no SAE, several, a damaged one, or one that cannot be had here.
        ConfigError: there is no such format or device, or place is no path.
    """
    target = resolve_device(str(device))
    return sae_of(*only(find(place, format=format, revision=revision, token=token), place)).to(target)


def only(found: Mapping[str, Found], place: str | Path) -> tuple[Content, Path]:
    """Return the SAE that there is, and where it was read from.

    Raises:
        CheckpointError: there are several, or it is damaged.
    """
    if len(found) > 1:
        names = sorted(found)
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        raise CheckpointError(
            f"{place} holds {len(names)} SAEs: {', '.join(names[:_SHOWN])}{more}. Name one of them, such as "
            f"{os.fspath(place).rstrip('/')}/{names[0]}."
        )
    (each,) = found.values()
    return read(each), each[1]


def read(found: Found) -> Content:
    """Return an SAE as its file has it.

    Raises:
        CheckpointError: it is damaged.
    """
    form, path = found
    content = form.read(path)
    check_numbers(content, form, path)
    return content


Found = tuple[Format, Path]
"""A format, and what its `read` is to be given."""


def find(
    place: str | Path,
    *,
    format: str | None = None,
    revision: str | None = None,
    token: str | None = None,
    several: bool = False,
) -> dict[str, Found]:
    """Return the SAEs at a place by their names; of one alone the name is "".

    Other arguments and errors as of `load`.

    Args:
        several: fetch all SAEs below a place on the hub, where it holds several.
    """
    path = _path_of(place, revision, token, several)
    form = None if format is None else format_named(format)
    if not path.exists():
        with suppress(StorageError):
            atomic.settle(path)  # a kill may have caught it while it was replaced
    if not path.exists():
        return {"": _part(path, form)}
    return (_of_run(path) if form in (None, OURS) else {}) or _in(path, form)


def _path_of(place: Any, revision: str | None, token: str | None, several: bool) -> Path:
    if isinstance(place, str) and place.startswith(SCHEME):
        return fetched(place, revision, token, several=several)
    if isinstance(place, str | os.PathLike) and re.match(r"(hf|https?):", os.fspath(place)):
        raise ConfigError(f"place: expected {SCHEME}USER/NAME, as text, of what lies on the hub, got {str(place)!r}.")
    for name, value in (("revision", revision), ("token", token)):
        if value is not None:
            raise ConfigError(f"{name}: expected nothing beside a place on this machine; it is of one on the hub.")
    return expand(place, "place")


def _of_run(path: Path) -> dict[str, Found]:
    """Return the SAEs that a run of ours has made; {} where this is none."""
    if is_sae(path / _OF_A_RUN):
        return {"": (OURS, path / _OF_A_RUN)}
    folders = sorted(folder for folder in path.glob(f"*/{_OF_A_RUN}") if is_sae(folder))
    return {folder.parent.name: (OURS, folder) for folder in folders}


def _in(path: Path, form: Format | None) -> dict[str, Found]:
    if form is None or form is OURS:
        _check_trained(path)
    form = recognised(path) if form is None else form
    parts = {} if form.parts is None else form.parts(path)
    return {name: (form, part) for name, part in parts.items()} or {"": (form, path)}


def _check_trained(path: Path) -> None:
    """Raise CheckpointError where a training of ours stands in the place of an SAE."""
    if (path / "manifest.json").exists() and (path / "tensors.safetensors").exists():
        raise CheckpointError(f"{path} is a checkpoint of a training: flashsae.load_checkpoint reads it as an SAE.")
    is_begun = any(path.glob("step-*/manifest.json")) or any(path.glob("checkpoints/**/manifest.json"))
    if is_begun and not OURS.detects(path):
        raise CheckpointError(
            f"{path} holds checkpoints of a training and no SAE: flashsae.load_checkpoint reads the newest as an SAE, "
            "and flashsae train --resume goes on with a run that has not ended."
        )
    if (path / "config.toml").is_file() and not any(form.detects(path) for form in formats().values()):
        raise CheckpointError(
            f"{path} holds no SAE: it is of a run that has not ended; flashsae train --resume {path} goes on with it."
        )


def _part(path: Path, form: Format | None) -> Found:
    """Return one of several SAEs, named behind their folder."""
    folder = next(parent for parent in path.parents if parent.exists())
    name = path.relative_to(folder).as_posix()
    try:
        there = (_of_run(folder) if form in (None, OURS) else {}) or _in(folder, form)
    except CheckpointError:
        there = {}
    if name not in there:
        names = [each for each in sorted(there) if each]
        beside = f"; {folder} holds {', '.join(names[:_SHOWN])}" if names else ""
        raise CheckpointError(f"{path} holds no SAE: there is no such file or folder{beside}.")
    return there[name]
