"""Our own format: flashsae.json says what flashsae.safetensors holds, and carries the checksums of both.

Version 2 holds any architecture: its name, its settings, every parameter by name, and what else is known of latents.
Version 3 is written where tokens are normalised, which readers of version 2 would pass over. Version 1, which held TopK
alone, is still read.
"""

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
from flashsae.documents import load_document, load_json, load_tensors, sealed
from flashsae.errors import CheckpointError, ConfigError, StorageError
from flashsae.schema import Name, Size

FORMAT = "flashsae.sae"
FORMAT_VERSION, _NORMALIZING_VERSION = 2, 3
_CONFIG_FILE = "flashsae.json"
_WEIGHTS_FILE = "flashsae.safetensors"
_EXTRA = "extra."
_OF_SYSTEMS = frozenset({".DS_Store", "Thumbs.db", "desktop.ini"})
"""What file browsers leave in a folder that was opened."""
_ADVICE = "Copy or save the SAE again."
_OVERWRITE = "give overwrite=True to replace an SAE, or choose another folder."
_Dtype = Literal["float32", "float64", "bfloat16", "float16"]


@dataclass(frozen=True)
class Description:
    """The content of flashsae.json."""

    architecture: Name
    settings: dict[str, Any]
    """Of the architecture, by name."""
    apply_b_dec_to_input: bool
    dtype: _Dtype
    d_in: Size
    d_out: Size
    d_sae: Size
    sha256: str
    """Of the weights."""
    metadata: dict[str, Any] = field(default_factory=dict)
    normalize_activations: Literal["none", "layer_norm"] = "none"
    """Of version 3."""


@dataclass(frozen=True)
class _DescriptionOfVersion1:
    architecture: Literal["topk"]
    dtype: _Dtype
    d_in: Size
    d_sae: Size
    k: Size
    sha256: str
    metadata: dict[str, Any] = field(default_factory=dict)

    def upgraded(self) -> Description:
        return Description(
            self.architecture,
            {"k": self.k},
            True,
            self.dtype,
            self.d_in,
            self.d_in,
            self.d_sae,
            self.sha256,
            self.metadata,
        )


def write(
    directory: Path,
    tensors: Mapping[str, Tensor],
    content: Mapping[str, Any],
    extras: Mapping[str, Tensor],
    *,
    overwrite: bool,
) -> None:
    """Write the folder of an SAE, all or nothing.

    Args:
        directory: must not exist, unless `overwrite` and it holds an SAE and nothing else.
        tensors: every parameter by name.
        content: of flashsae.json, without what is the same for all: see `Description`.
        extras: by name, [d_sae] each: what is known of every latent.
        overwrite: replace an SAE that is there.
    Raises:
        ConfigError: the metadata are nothing that JSON holds.
        StorageError: the folder exists, holds files that are not ours, or cannot be written.
    """
    is_normalizing = "normalize_activations" in content
    description = {
        "format": FORMAT,
        "format_version": _NORMALIZING_VERSION if is_normalizing else FORMAT_VERSION,
        "flashsae_version": packages.version("flashsae"),
        **content,
        "metadata": _plain_metadata(content["metadata"]),
    }
    if overwrite and directory.exists():
        _check_replaceable(directory)
    with files.atomic_directory(directory, overwrite=overwrite, advice=_OVERWRITE) as folder:
        named = {f"{_EXTRA}{name}": tensor.detach().clone() for name, tensor in extras.items()}  # no two share memory
        files.save_tensors(folder / _WEIGHTS_FILE, {**tensors, **named})
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


def read(folder: Path) -> tuple[Description, dict[str, Tensor]]:
    """Return the description and the parameters of a saved SAE, each checked; not yet that they fit each other.

    Raises:
        CheckpointError: the folder holds no FlashSAE SAE, a damaged one, or one of a newer format.
    """
    description, tensors = _read_all(folder)
    return description, {name: tensor for name, tensor in tensors.items() if not name.startswith(_EXTRA)}


def read_extras(folder: Path) -> dict[str, Tensor]:
    """Return what is known of every latent, by name: [d_sae] each.

    Raises:
        CheckpointError: as `read`.
    """
    _, tensors = _read_all(folder)
    return {name.removeprefix(_EXTRA): tensor for name, tensor in tensors.items() if name.startswith(_EXTRA)}


def _read_all(folder: Path) -> tuple[Description, dict[str, Tensor]]:
    description = read_description(folder)
    files.check_sha256(folder / _WEIGHTS_FILE, description.sha256, _CONFIG_FILE, _ADVICE)
    return description, load_tensors(folder / _WEIGHTS_FILE)


def check_tensors(folder: Path, tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError unless the tensors of a saved SAE are those that its description calls for.

    Args:
        folder: for the message.
        tensors: as `read` returned them.
        like: tensors of the names, shapes and dtypes that they must have.
    """
    expected, found = (
        {name: f"{_name(tensor.dtype)} {list(tensor.shape)}" for name, tensor in each.items()}
        for each in (like, tensors)
    )
    if expected != found:
        raise CheckpointError(
            f"{folder / _WEIGHTS_FILE} does not fit {_CONFIG_FILE}: expected tensors {_listed(expected)}, got "
            f"{_listed(found)}. Save the SAE again."
        )


def read_description(folder: Path) -> Description:
    """Return the checked flashsae.json of a folder.

    Raises:
        CheckpointError: there is none, it is damaged, foreign, or of a newer format.
    """
    path = folder / _CONFIG_FILE
    if not folder.exists():
        with suppress(StorageError):
            files.settle(folder)  # a kill may have caught it while it was replaced
    if not path.exists() and (folder / "manifest.json").exists():
        raise CheckpointError(f"{folder} is a checkpoint of a training: flashsae.load_checkpoint reads it as an SAE.")
    if not path.exists():
        found = ", ".join(sorted(p.name for p in folder.iterdir())[:5]) if folder.is_dir() else "no such folder"
        raise CheckpointError(
            f"{folder} holds no FlashSAE SAE: expected {_CONFIG_FILE} in it, found {found or 'nothing'}."
        )
    content = load_json(path, _ADVICE)
    version = content.get("format_version") if isinstance(content, dict) else None
    if version is not True and version == 1:
        return load_document(path, _DescriptionOfVersion1, head=(FORMAT, 1), advice=_ADVICE).upgraded()
    newest = _NORMALIZING_VERSION if version == _NORMALIZING_VERSION else FORMAT_VERSION
    return load_document(path, Description, head=(FORMAT, newest), advice=_ADVICE)


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
