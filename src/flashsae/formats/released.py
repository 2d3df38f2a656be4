"""What is common to SAEs that somebody published: where a file lies tells what it is of, and nobody writes them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from flashsae.formats.content import Content
from flashsae.formats.selection import joined, settings_of_reading
from flashsae.natural import in_order


def place_of(path: Path) -> str:
    """Return where a file or folder lies; in the cache of the hub the name of the repository is part of that."""
    return path.absolute().as_posix()  # links are not followed: those of the cache lead to names that tell nothing


def folders_with(path: Path, file: str, *patterns: str) -> dict[str, Path]:
    """Return the folders below one that have a file, by their paths from there; {} where the folder has it itself.

    Args:
        path: of the folder.
        file: its name.
        patterns: what the folders below are called, as in a shell.
    """
    if os.path.isfile(path / file) or not os.path.isdir(path):
        return {}
    found = [each.parent.relative_to(path).as_posix() for names in patterns for each in path.glob(f"{names}/{file}")]
    return {name: path / name for name in in_order(found)}


def number_in(place: str, pattern: str) -> int | None:
    """Return the number that a pattern has a group for, where it stands last in a place; None where it does not."""
    found = re.findall(pattern, place)
    return int(found[-1]) if found else None


def known(**metadata: Any) -> dict[str, Any]:
    """Return of metadata those that are known."""
    return {name: value for name, value in metadata.items() if value not in (None, {})}


def hooks_for_others(*names: str) -> dict[str, dict[str, Any]]:
    """Return what other formats are to know of places that no module of a model has, and transformer-lens a name for.

    Args:
        names: such as blocks.5.ln2.hook_normalized: what is read, and of a transcoder what it reconstructs.
    """
    told: dict[str, dict[str, Any]] = {"saelens": dict(zip(("hook_name", "hook_name_out"), names))}
    found = [re.fullmatch(r"blocks\.(\d+)\.([\w.]+)", name) for name in names]
    places = [(int(each[1]), each[2]) for each in found if each]
    if len(places) == 2 and places[0][0] == places[1][0]:
        (layer, reads), (_, writes) = places
        told["circuit_tracer"] = {"layer": layer, "feature_input_hook": reads, "feature_output_hook": writes}
    return told


def jump_relu(tensors: dict[str, Tensor], outer: str, l0: float | None, metadata: Mapping[str, Any]) -> Content:
    """Return relu(z) · H(z − threshold) with z = x @ W_enc + b_enc, an SAE that does not subtract b_dec.

    A threshold below 0 lets through what is above 0, and is 0 here, where the ReLU is left out.

    Args:
        tensors: by our names, with threshold [d_sae].
        outer: transcoder or skip_transcoder; "" for an SAE.
        l0: what it is known to have.
        metadata: of its training.
    """
    return Content(
        architecture=joined(outer, "jump_relu"),
        settings=settings_of_reading("jump_relu", len(tensors["threshold"]), l0),
        tensors={**tensors, "threshold": tensors["threshold"].clamp_min(0.0)},
        apply_b_dec_to_input=False,
        metadata=metadata,
    )
