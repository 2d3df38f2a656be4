"""A saved SAE on disk: flashsae.json says what flashsae.safetensors holds, and carries the checksums of both."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata as packages
from pathlib import Path, PurePath
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from flashsae import files
from flashsae.documents import load_document, load_tensors, sealed
from flashsae.errors import CheckpointError, ConfigError, StorageError
from flashsae.schema import Size

FORMAT = "flashsae.sae"
FORMAT_VERSION = 1
_CONFIG_FILE = "flashsae.json"
_WEIGHTS_FILE = "flashsae.safetensors"
_OF_SYSTEMS = frozenset({".DS_Store", "Thumbs.db", "desktop.ini"})
"""What file browsers leave in a folder that was opened."""
_ADVICE = "Copy or save the SAE again."


@dataclass(frozen=True)
class Description:
    """The content of flashsae.json."""

    architecture: Literal["topk"]
    dtype: Literal["float32", "float64", "bfloat16", "float16"]
    d_in: Size
    d_sae: Size
    k: Size
    sha256: str
    """Of the weights."""
    metadata: dict[str, Any] = field(default_factory=dict)


def write_sae(directory: Path, tensors: Mapping[str, Tensor], content: Mapping[str, Any], *, overwrite: bool) -> None:
    """Write the folder of an SAE, all or nothing.

    Args:
        directory: must not exist, unless `overwrite` and it holds an SAE and nothing else.
        tensors: the weights.
        content: of flashsae.json, without what is the same for all: see `Description`.
        overwrite: replace an SAE that is there.
    Raises:
        ConfigError: the metadata are nothing that JSON holds.
        StorageError: the folder exists, holds files that are not ours, or cannot be written.
    """
    description = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "flashsae_version": packages.version("flashsae"),
        **content,
        "metadata": _plain_metadata(content["metadata"]),
    }
    if overwrite and directory.exists():
        _check_replaceable(directory)
    with files.atomic_directory(directory, overwrite=overwrite) as folder:
        files.save_tensors(folder / _WEIGHTS_FILE, tensors)
        description["sha256"] = files.sha256(folder / _WEIGHTS_FILE)
        (folder / _CONFIG_FILE).write_text(json.dumps(sealed(description), indent=2) + "\n", "utf-8")


def _check_replaceable(directory: Path) -> None:
    """Raise StorageError unless a folder holds an SAE and nothing that somebody else would miss."""
    if not (directory / _CONFIG_FILE).exists():
        raise StorageError(f"{directory} holds no FlashSAE SAE and is not replaced; choose another folder.")
    with files.storage_errors(directory):
        foreign = sorted({path.name for path in directory.iterdir()} - {_CONFIG_FILE, _WEIGHTS_FILE} - _OF_SYSTEMS)
    if foreign:
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise StorageError(
            f"{directory} holds {foreign[0]}{more} beside the SAE, which replacing the folder would delete: move that "
            "away, or choose another folder."
        )


def read_sae(folder: Path) -> tuple[Description, dict[str, Tensor]]:
    """Return the description and the weights of a saved SAE, both checked, and that they fit each other.

    Raises:
        CheckpointError: the folder holds no FlashSAE SAE, a damaged one, or one of a newer format.
    """
    description = read_description(folder)
    files.check_sha256(folder / _WEIGHTS_FILE, description.sha256, _CONFIG_FILE, _ADVICE)
    tensors = load_tensors(folder / _WEIGHTS_FILE)
    d_in, d_sae = description.d_in, description.d_sae
    shapes = {"W_enc_T": [d_sae, d_in], "b_enc": [d_sae], "W_dec": [d_sae, d_in], "b_dec": [d_in]}
    expected = {name: f"{description.dtype} {shape}" for name, shape in shapes.items()}
    found = {name: f"{_name(tensor.dtype)} {list(tensor.shape)}" for name, tensor in tensors.items()}
    if expected != found:
        raise CheckpointError(
            f"{folder / _WEIGHTS_FILE} does not fit {_CONFIG_FILE}: expected tensors {_listed(expected)}, got "
            f"{_listed(found)}. Save the SAE again."
        )
    return description, tensors


def read_description(folder: Path) -> Description:
    """Return the checked flashsae.json of a folder.

    Raises:
        CheckpointError: there is none, it is damaged, foreign, or of a newer format.
    """
    path = folder / _CONFIG_FILE
    if not folder.exists():
        with suppress(StorageError):
            files.settle(folder)  # a kill may have caught it while it was replaced
    if not path.exists():
        found = ", ".join(sorted(p.name for p in folder.iterdir())[:5]) if folder.is_dir() else "no such folder"
        raise CheckpointError(
            f"{folder} holds no FlashSAE SAE: expected {_CONFIG_FILE} in it, found {found or 'nothing'}."
        )
    description = load_document(path, Description, head=(FORMAT, FORMAT_VERSION), advice=_ADVICE)
    if description.k > description.d_sae:
        raise CheckpointError(f"{path} is damaged: expected k <= d_sae, got k = {description.k}. {_ADVICE}")
    return description


def _plain_metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return metadata as JSON will give them back."""
    try:
        return dict(json.loads(json.dumps(dict(metadata), default=_plain, allow_nan=False)))
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"metadata: expected what JSON can hold ({error}). Convert it to text or numbers.") from error


def _plain(value: object) -> object:
    if isinstance(value, PurePath | torch.device):
        return str(value)
    if isinstance(value, torch.dtype):
        return _name(value)
    if isinstance(value, np.generic | np.ndarray | Tensor):
        return value.tolist()
    raise TypeError(f"got a value of the type {type(value).__name__}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _listed(shapes: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {shape}" for name, shape in sorted(shapes.items()))
