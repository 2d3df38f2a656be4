"""What a file holds of an SAE, in our names, whatever its format; and what a format is."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashsae.errors import ConfigError


@dataclass(frozen=True)
class Content:
    """An SAE as a value: what every format is read to, and written from.

    Args:
        architecture: its name, as of `flashsae.architecture.architecture_named`.
        settings: of the architecture, by name.
        tensors: the parameters that are saved, by our names: W_enc_T [d_sae, d_in], b_enc [d_sae], W_dec
            [d_sae, d_out], b_dec [d_out], and those of the architecture, such as threshold; on the CPU, of one dtype.
        apply_b_dec_to_input: whether the encoder sees x − b_dec.
        normalize_activations: of `flashsae.SAEConfig`.
        metadata: what is known of its training, by our names: model, hookpoint, dataset, context_length ...; what JSON
            can hold.
        extras: [d_sae] each: what is known of every latent.
    """

    architecture: str
    settings: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    apply_b_dec_to_input: bool = True
    normalize_activations: str = "none"
    metadata: Mapping[str, Any] = field(default_factory=dict)
    extras: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def d_in(self) -> int:
        """Width of what goes in."""
        return self.tensors["W_enc_T"].shape[1]

    @property
    def d_out(self) -> int:
        """Width of what is reconstructed."""
        return self.tensors["W_dec"].shape[1]

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self.tensors["W_dec"].shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters."""
        return self.tensors["W_dec"].dtype


def kept_of(metadata: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return what a format said of an SAE that was read from it, and we have no names for; {} where it was not.

    Args:
        metadata: of the SAE.
        name: of the format, under which that is kept.
    """
    kept = metadata.get(name)
    return dict(kept) if isinstance(kept, Mapping) else {}


Write = Callable[[Path, Content, bool], list[str]]
"""Into an empty folder, an SAE, and whether anything may be given up: returns what was."""


@dataclass(frozen=True)
class Format:
    """A way to write SAEs down.

    Args:
        name: of the options --to, --export and format=.
        title: for people.
        detects: tells whether a file or folder is of this format, by names and small files alone; never raises. Of a
            folder that holds several, too.
        read: returns what it holds, each value checked: CheckpointError on what is missing, damaged or cannot be held.
        write: writes into a folder that is there and empty; returns a sentence for everything that was given up, which
            happens only where it is allowed by its last argument. Refuses what the format cannot hold: ConfigError.
            None where nobody writes it.
        write_set: the same for several SAEs by hookpoint, for formats that have them in one folder.
        parts: of a folder that holds several, what `read` is to be given for each, by its name; {} of one alone.
        is_whole: whether the SAEs of a model belong together: a run of several writes them as one set.
        source: who defines it.
    """

    name: str
    title: str
    detects: Callable[[Path], bool]
    read: Callable[[Path], Content]
    write: Write | None = None
    write_set: Callable[[Path, Mapping[str, Content], bool], list[str]] | None = None
    parts: Callable[[Path], Mapping[str, Path]] | None = None
    is_whole: bool = False
    source: str = ""


def plain_metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return metadata as JSON will give them back.

    Args:
        metadata: by name; a path, a dtype, a device and an array may be among them.
    Raises:
        ConfigError: JSON cannot hold them, such as NaN.
    """
    try:
        return dict(json.loads(json.dumps(dict(metadata), default=_plain, allow_nan=False)))
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"metadata: expected what JSON can hold ({error}). Convert it to text or numbers.") from error


def _plain(value: object) -> object:
    if isinstance(value, PurePath | torch.device):
        return str(value)
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, np.generic | np.ndarray | Tensor):
        return value.tolist()
    raise TypeError(f"got a value of the type {type(value).__name__}")
