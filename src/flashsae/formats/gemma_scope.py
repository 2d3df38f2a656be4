"""Gemma Scope: SAEs and transcoders of Gemma 2, params.npz in a folder that tells what they are of.

    f = relu(z) · H(z − threshold),   z = x @ W_enc + b_enc;   x_hat = f @ W_dec + b_dec

b_dec is not subtracted from what goes in. The transcoders read what the norm before the MLP gives before it multiplies
by its weights, which no module gives. Those of the embedding are of its rows, before the model multiplies by √d_in.

Source: Lieberum et al. 2024 (Gemma Scope), sections 3 and 4; google/gemma-scope on the hub.
"""

from __future__ import annotations

import math
import os
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashsae.errors import CheckpointError
from flashsae.files.documents import check_file
from flashsae.files.reading import refusal
from flashsae.formats.checks import check_alone, check_finite, check_tensors, of_one_dtype, sizes
from flashsae.formats.content import Content, Format
from flashsae.formats.hook_names import hookpoint_of
from flashsae.formats.released import (
    folders_with,
    hooks_for_others,
    jump_relu,
    known,
    number_in,
    place_of,
)

_FILE = "params.npz"
_ADVICE = "Fetch it again."
_SITES = {"res": "hook_resid_post", "mlp": "hook_mlp_out", "att": "attn.hook_z", "transcoders": ""}
_REPOSITORY = rf"gemma-scope-(2b|9b|27b)-(pt|it)-({'|'.join(_SITES)})(?=/|$)"
_CONTEXT_LENGTH = 1024


def detects(path: Path) -> bool:
    """Tell whether a folder has a params.npz, or some below that are called so, or a file is an .npz."""
    is_one = os.path.isfile(path / _FILE) or (path.suffix == ".npz" and os.path.isfile(path))
    return is_one or bool(parts(path))


def parts(path: Path) -> dict[str, Path]:
    """Return the SAEs of a folder such as layer_20/width_16k, or of a whole repository, by the names of theirs."""
    folders = ("", "width_*/", "layer_*/width_*/", "embedding/width_*/")
    return folders_with(path, _FILE, *(f"{folder}average_l0_*" for folder in folders))


def read(path: Path) -> Content:
    """Return what params.npz holds."""
    check_alone(path, parts(path))
    file = path / _FILE if path.is_dir() else path
    arrays = _arrays(file)
    scaling = arrays.pop("scaling_factor", None)
    if scaling is not None and not bool((scaling == 1).all()):
        raise CheckpointError(
            f"{file} has a scaling_factor that is not 1, with which latents were multiplied after the training, and "
            "FlashSAE has no place for it: use it with SAELens."
        )
    (F,), (d,) = sizes(arrays, "b_enc", 1), sizes(arrays, "b_dec", 1)
    shapes = {"W_enc": (d, F), "W_dec": (F, d), "b_enc": (F,), "b_dec": (d,), "threshold": (F,)}
    check_tensors(file, arrays, shapes)
    is_transcoder, l0, metadata = _told(place_of(file))
    check_finite(file, arrays)
    tensors = of_one_dtype(arrays)
    tensors["W_enc_T"] = tensors.pop("W_enc").T.contiguous()
    return jump_relu(tensors, "transcoder" if is_transcoder else "", l0, metadata)


def _told(place: str) -> tuple[bool, int | None, dict[str, Any]]:
    """Return what a place tells: whether it is a transcoder, its L0, and what it is of."""
    l0, layer = number_in(place, r"average_l0_(\d+)(?=/|$)"), number_in(place, r"/layer_(\d+)(?=/)")
    found = re.search(_REPOSITORY, place)
    if found is None:
        return False, l0, known(l0=l0)
    size, kind, site = found.groups()
    model = f"google/gemma-2-{size}{'' if kind == 'pt' else '-it'}"
    is_transcoder = site == "transcoders"
    hookpoint = None if layer is None else hookpoint_of(f"blocks.{layer}.{_SITES[site]}", model)
    own = {"repository": f"google/{found[0]}", **known(layer=layer)}
    theirs = {}
    if is_transcoder and layer is not None:
        theirs = hooks_for_others(f"blocks.{layer}.ln2.hook_normalized", f"blocks.{layer}.hook_mlp_out")
    metadata = known(
        model=model,
        hookpoint=hookpoint,
        context_length=_CONTEXT_LENGTH,
        l0=l0,
        gemma_scope=own,
        **theirs,
    )
    return is_transcoder, l0, metadata


def _arrays(path: Path) -> dict[str, Tensor]:
    """Return the arrays of an .npz file by their names of now, none larger than the file, and nothing in it run.

    Raises:
        CheckpointError: it is missing or damaged, or holds anything but floats.
    """
    try:
        check_file(path)
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            is_plain = all(each.compress_type == zipfile.ZIP_STORED and not each.flag_bits & 1 for each in entries)
            if not is_plain or sum(each.file_size for each in entries) > os.path.getsize(path):
                raise ValueError("its arrays are compressed, or larger than the file")
            by_name = {re.sub("^w_", "W_", each.filename.removesuffix(".npy")): each for each in entries}
            if len(by_name) < len(entries):
                raise ValueError("a name stands there twice")
            return {name: _array(archive, each, path) for name, each in by_name.items()}
    except CheckpointError:
        raise
    except Exception as error:  # numpy and zipfile raise whatever damaged bytes lead them to
        is_told = isinstance(error, OSError | ValueError | zipfile.BadZipFile)
        reason = error if is_told else ValueError(type(error).__name__)
        raise CheckpointError(f"cannot read {path}: {refusal(path, reason)} {_ADVICE}") from error


def _array(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, path: Path) -> Tensor:
    with archive.open(entry) as file:
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        version = np.lib.format.read_magic(file)
        if version not in readers:
            raise ValueError(f"{entry.filename[:60]} is an array of version {version[0]}.{version[1]}")
        shape, _, dtype = readers[version](file)
        if dtype.kind != "f" or dtype.itemsize > 8:
            raise CheckpointError(
                f"{path} is not read: {entry.filename[:60]} holds {_kind(dtype)}, and weights are floats. Take it "
                "from whoever published the SAE."
            )
        if math.prod(shape) * dtype.itemsize != entry.file_size - file.tell():
            raise ValueError(f"{entry.filename[:60]} is cut short, or not of the shape that it names")
    with archive.open(entry) as file:
        array = np.lib.format.read_array(file, allow_pickle=False)
        if file.read(1):  # the checksum is compared at the end
            raise ValueError(f"{entry.filename[:60]} is longer than its array")
    return torch.from_numpy(np.ascontiguousarray(array, dtype.newbyteorder("=")).reshape(shape))


def _kind(dtype: Any) -> str:
    return "objects, which may run something when they are read" if dtype.hasobject else str(dtype)[:40]


FORMAT = Format(
    "gemma_scope",
    "Gemma Scope",
    detects,
    read,
    parts=parts,
    source="Lieberum et al. 2024; google/gemma-scope",
)
