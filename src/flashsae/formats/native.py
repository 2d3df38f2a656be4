"""Our own format: flashsae.json says what flashsae.safetensors holds, and carries the checksums of both.

Version 2 holds any architecture: its name, its settings, every parameter by name, and what else is known of latents.
Version 3 is written where tokens are normalised, which readers of version 2 would pass over, and version 4 where that
is by their norm alone, which those of version 3 do not know. Version 1, which held TopK alone, is still read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata as packages
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from flashsae.architecture import Parameter, architecture_named
from flashsae.errors import CheckpointError, ConfigError, StorageError
from flashsae.files import atomic
from flashsae.files.documents import load_document, load_json, load_tensors, sealed
from flashsae.files.reading import check_sha256, sha256
from flashsae.files.schema import Name, Size
from flashsae.formats.content import Content, Format, plain_metadata

KIND = "flashsae.sae"
_VERSIONS = {"none": 2, "layer_norm": 3, "token_norm": 4}
"""By what is done to tokens."""
_CONFIG_FILE = "flashsae.json"
_WEIGHTS_FILE = "flashsae.safetensors"
_EXTRA = "extra."
_ADVICE = "Copy or save the SAE again."
_Dtype = Literal["float32", "float64", "bfloat16", "float16"]
DTYPES = tuple(getattr(torch, name) for name in get_args(_Dtype))
"""That weights may have."""


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
    normalize_activations: Literal["none", "layer_norm", "token_norm"] = "none"
    """Of version 3 and 4."""

    @property
    def sizes(self) -> dict[str, int]:
        """What the shapes of parameters are made of."""
        return {"d_in": self.d_in, "d_out": self.d_out, "d_sae": self.d_sae}


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


def write(folder: Path, content: Content, lossy: bool = False) -> list[str]:
    """Write an SAE of any kind.

    Args:
        folder: empty.
        content: what is written.
        lossy: nothing is ever given up.
    Raises:
        ConfigError: the metadata are nothing that JSON holds.
        StorageError: the file system refused.
    """
    kind = content.normalize_activations
    description = {
        "format": KIND,
        "format_version": _VERSIONS[kind],
        "flashsae_version": packages.version("flashsae"),
        "architecture": content.architecture,
        "settings": dict(content.settings),
        "apply_b_dec_to_input": content.apply_b_dec_to_input,
        "dtype": _name(content.dtype),
        "d_in": content.d_in,
        "d_out": content.d_out,
        "d_sae": content.d_sae,
        **({"normalize_activations": kind} if kind != "none" else {}),
        "metadata": plain_metadata(content.metadata),
    }
    named = {
        f"{_EXTRA}{name}": tensor.detach().clone() for name, tensor in content.extras.items()
    }  # no two share memory
    atomic.save_tensors(folder / _WEIGHTS_FILE, {**content.tensors, **named})
    description["sha256"] = sha256(folder / _WEIGHTS_FILE)
    (folder / _CONFIG_FILE).write_text(json.dumps(sealed(description), indent=2) + "\n", "utf-8")
    return []


def add_metadata(folder: Path, more: Mapping[str, Any]) -> None:
    """Let an SAE that is written tell more of itself; its weights stay as they are.

    Args:
        folder: of the SAE.
        more: by name, in the place of what has these names.
    Raises:
        CheckpointError: there is none, or it is damaged.
        StorageError: the file system refused; the SAE is as it was.
    """
    read_description(folder)
    content = load_json(folder / _CONFIG_FILE, _ADVICE)
    content["metadata"] = {**content["metadata"], **plain_metadata(more)}
    atomic.write_atomic(folder / _CONFIG_FILE, json.dumps(sealed(content), indent=2) + "\n")


def detects(path: Path) -> bool:
    """Tell whether a folder holds an SAE of ours, or several in folders of their names."""
    return is_sae(path) or bool(parts(path))


def is_sae(path: Path) -> bool:
    """Tell whether a folder holds an SAE of ours itself."""
    return (path / _CONFIG_FILE).is_file()


def parts(folder: Path) -> dict[str, Path]:
    """Return the SAEs in folders of their names; {} where the folder is one itself."""
    found = [] if is_sae(folder) else [*folder.glob(f"*/{_CONFIG_FILE}"), *folder.glob(f"*/*/{_CONFIG_FILE}")]
    return {path.parent.relative_to(folder).as_posix(): path.parent for path in sorted(found)}


def read(folder: Path) -> Content:
    """Return what a folder holds of an SAE, each part checked; not yet that they fit each other.

    Raises:
        CheckpointError: the folder holds no FlashSAE SAE, a damaged one, or one of a newer format.
    """
    description = read_description(folder)
    check_sha256(folder / _WEIGHTS_FILE, description.sha256, _CONFIG_FILE, _ADVICE)
    found = load_tensors(folder / _WEIGHTS_FILE)
    tensors = {name: tensor for name, tensor in found.items() if not name.startswith(_EXTRA)}
    try:
        table = architecture_named(description.architecture).parameters
    except ConfigError as error:
        raise CheckpointError(f"{folder} cannot be read here: {error}") from error
    misfit = f"{folder / _WEIGHTS_FILE} does not fit {_CONFIG_FILE}"
    check_tensors(misfit, tensors, table, description.sizes, getattr(torch, description.dtype))
    return Content(
        description.architecture,
        description.settings,
        tensors,
        description.apply_b_dec_to_input,
        description.normalize_activations,
        description.metadata,
        {name.removeprefix(_EXTRA): tensor for name, tensor in found.items() if name.startswith(_EXTRA)},
    )


def check_tensors(
    misfit: str,
    tensors: Mapping[str, Tensor],
    table: Iterable[Parameter],
    sizes: Mapping[str, int],
    dtype: torch.dtype,
) -> None:
    """Raise CheckpointError unless the tensors of an SAE are those of a table of parameters that are saved.

    Args:
        misfit: what it is if they are not, for the message.
        tensors: by name.
        table: of the architecture.
        sizes: that shapes are made of.
        dtype: of all.
    """
    expected = {row.name: f"{_name(dtype)} {list(row.sizes(sizes))}" for row in table if row.saved}
    found = {name: f"{_name(tensor.dtype)} {list(tensor.shape)}" for name, tensor in tensors.items()}
    if expected != found:
        raise CheckpointError(
            f"{misfit}: expected tensors {_listed(expected)}, got {_listed(found)}. Save the SAE again."
        )


def read_description(folder: Path) -> Description:
    """Return the checked flashsae.json of a folder.

    Raises:
        CheckpointError: there is none, it is damaged, foreign, or of a newer format.
    """
    path = folder / _CONFIG_FILE
    if not folder.exists():
        with suppress(StorageError):
            atomic.settle(folder)  # a kill may have caught it while it was replaced
    if not path.exists() and (folder / "manifest.json").exists():
        raise CheckpointError(f"{folder} is a checkpoint of a training: flashsae.load_checkpoint reads it as an SAE.")
    if not path.exists():
        found = ", ".join(sorted(p.name for p in folder.iterdir())[:5]) if folder.is_dir() else "no such folder"
        raise CheckpointError(
            f"{folder} holds no FlashSAE SAE: expected {_CONFIG_FILE} in it, found {found or 'nothing'}. Runs and "
            "SAEs of other libraries are read by flashsae.load."
        )
    content = load_json(path, _ADVICE)
    version = content.get("format_version") if isinstance(content, dict) else None
    if version is not True and version == 1:
        return load_document(path, _DescriptionOfVersion1, head=(KIND, 1), advice=_ADVICE).upgraded()
    known = version if isinstance(version, int) and version in _VERSIONS.values() else _VERSIONS["none"]
    description = load_document(path, Description, head=(KIND, known), advice=_ADVICE)
    if _VERSIONS[description.normalize_activations] != known:
        raise CheckpointError(
            f"{path} is damaged: normalize_activations is {description.normalize_activations}, which is none of "
            f"version {known}. {_ADVICE}"
        )
    return description


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _listed(shapes: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {shape}" for name, shape in sorted(shapes.items()))


FORMAT = Format("flashsae", "FlashSAE", detects, read, write, parts=parts, source="docs/formats.md")
