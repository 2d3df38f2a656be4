"""SAEs in folders, as what they are and their tensors: what is written of one, and read again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashsae.architecture import settings_of
from flashsae.errors import CheckpointError, ConfigError, DtypeError, FlashSAEError, StorageError
from flashsae.files import atomic
from flashsae.formats import native
from flashsae.formats.content import Content, Format, Write, plain_metadata
from flashsae.formats.registry import formats
from flashsae.ops.validate import check_shape
from flashsae.sae.config import SAEConfig
from flashsae.sae.initial import initial_values
from flashsae.settings.kinds import as_json, check, expand

_OF_SYSTEMS = frozenset({".DS_Store", "Thumbs.db", "desktop.ini"})
"""What file browsers leave in a folder that was opened."""
OVERWRITE = "give overwrite=True, or --overwrite, to replace an SAE, or choose another folder."


def content_from(
    config: SAEConfig, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], extras: Mapping[str, Tensor]
) -> Content:
    """Return an SAE as a value.

    Args:
        config: what it is.
        tensors: all parameters that are saved, by name.
        metadata: anything JSON can hold.
        extras: [d_sae] each.
    Raises:
        ShapeError, DtypeError: an extra is not [d_sae], or parameters have different dtypes.
    """
    dtype = tensors["W_dec"].dtype
    for name, tensor in tensors.items():
        if tensor.dtype != dtype:
            raise DtypeError(
                f"{name}: expected {dtype}, the dtype of W_dec, got {tensor.dtype}. Convert the SAE first: "
                "sae.float().save(...)."
            )
    for name, extra in extras.items():
        check_shape(f"extras: {name}", extra, (config.d_sae,))
    return Content(
        config.architecture.name,
        as_json(asdict(config.arch)),
        {name: tensor.detach().cpu() for name, tensor in tensors.items()},
        config.apply_b_dec_to_input,
        config.normalize_activations,
        plain_metadata(metadata),
        {name: tensor.detach().cpu() for name, tensor in extras.items()},
    )


def write(content: Content, directory: str | Path, form: Format, *, lossy: bool, overwrite: bool) -> list[str]:
    """Write an SAE to a folder, all or nothing.

    Args:
        content: the SAE.
        directory: must not exist, unless `overwrite` and it holds an SAE of this format and nothing else.
        form: what to write.
        lossy: let the format give up what it cannot hold.
        overwrite: replace an SAE that is there.
    Returns:
        a sentence for each thing that was given up.
    Raises:
        ConfigError: the format cannot hold it, or is not written by us.
        StorageError: the folder exists, holds files that are not of the SAE, or cannot be written.
    """
    check("overwrite", overwrite, bool)
    check("lossy", lossy, bool)
    check_written(form)
    path = expand(directory, "directory")
    is_there = overwrite and path.exists()
    if is_there and not form.detects(path):
        raise StorageError(f"{path} holds no {form.title} SAE and is not replaced; choose another folder.")
    check_numbers(content, form)
    with atomic.atomic_directory(path, overwrite=overwrite, advice=OVERWRITE) as folder:
        given_up = check_written(form)(folder, content, lossy)
        if is_there:
            check_replaceable(path, folder)
    return given_up


def check_numbers(content: Content, form: Format, path: Path | None = None) -> None:
    """Refuse an SAE with parameters that are no numbers in a format of others; in ours it can be looked into.

    Args:
        content: the SAE.
        form: what it is written in, or was read from.
        path: that it was read from.
    Raises:
        CheckpointError: it was read.
        ConfigError: it is to be written.
    """
    name = next((name for name, tensor in content.tensors.items() if tensor.isnan().any()), None)
    if name is None or form is native.FORMAT:
        return
    if path is None:
        raise ConfigError(f"{name} holds values that are no numbers (NaN): {form.title} is not written of such an SAE.")
    raise CheckpointError(f"{path} is damaged: {name} holds values that are no numbers (NaN). Fetch or save it again.")


def check_written(form: Format) -> Write:
    """Return what writes a format; raise ConfigError where it is only read."""
    if form.write is None:
        names = ", ".join(name for name, each in formats().items() if each.write is not None)
        raise ConfigError(f"format: {form.name} is read and not written; expected one of {names}.")
    return form.write


def check_replaceable(directory: Path, by: Path) -> None:
    """Raise StorageError if a folder holds what somebody would miss who has the folder that takes its place."""
    with atomic.storage_errors(directory):
        there, ours = ({path.relative_to(each) for path in each.rglob("*")} for each in (directory, by))
    foreign = sorted(str(path) for path in there - ours if path.name not in _OF_SYSTEMS)
    if foreign:
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise StorageError(
            f"{directory} holds {foreign[0]}{more} beside the SAE, which replacing the folder would delete: move that "
            "away, or choose another folder."
        )


def config_from(content: Content, where: Path | str) -> SAEConfig:
    """Return what an SAE is.

    Args:
        content: it.
        where: it was read from, for the message.
    Raises:
        CheckpointError: there is no such SAE here.
    """
    return _config(content, _sizes(content, where), where)


def _config(what: Content | native.Description, sizes: Mapping[str, int], where: Path | str) -> SAEConfig:
    kind: Any = what.normalize_activations
    try:
        return SAEConfig(
            sizes["d_in"],
            sizes["d_sae"],
            arch=settings_of(what.architecture, **what.settings),
            d_out=sizes["d_out"],
            normalize_activations=kind,
            apply_b_dec_to_input=what.apply_b_dec_to_input,
        )
    except FlashSAEError as error:
        raise CheckpointError(f"{where} cannot be read here: {error}") from error


def _sizes(content: Content, where: Path | str) -> dict[str, int]:
    tensors = content.tensors
    for name in ("W_enc_T", "W_dec"):
        if name not in tensors or tensors[name].dim() != 2:
            got = "none" if name not in tensors else list(tensors[name].shape)
            raise CheckpointError(f"{where} holds no SAE: expected a matrix {name} in it, got {got}.")
    return {"d_in": content.d_in, "d_out": content.d_out, "d_sae": content.d_sae}


def values_from(content: Content, config: SAEConfig, where: Path | str) -> dict[str, Tensor]:
    """Return all parameters of an SAE, by name: what its content does not have, and no training has learnt, as it is
    at the start.

    Args:
        content: the SAE.
        config: of it.
        where: it was read from, for the message.
    Raises:
        CheckpointError: tensors do not fit the architecture and each other.
    """
    table, dtype = config.architecture.parameters, content.dtype
    if dtype not in native.DTYPES:
        raise CheckpointError(f"{where} cannot be read here: expected weights of a float dtype, got {dtype}.")
    may_lack = tuple(row for row in table if not row.trained and row.name not in content.tensors)
    there = tuple(row for row in table if row not in may_lack)
    misfit = f"{where} does not fit {config.architecture.title}"
    native.check_tensors(misfit, content.tensors, there, config.sizes, dtype)
    tensors = {name: tensor.contiguous() for name, tensor in content.tensors.items()}
    return tensors | initial_values(may_lack, config.sizes, None, dtype, "cpu")


def read(directory: str | Path) -> tuple[SAEConfig, dict[str, Tensor]]:
    """Read what an SAE of our own format is, and its parameters, which are checked to be those that it has.

    Raises:
        CheckpointError: as `flashsae.SAE.load`.
    """
    folder = expand(directory, "directory")
    content = native.read(folder)
    config = config_from(content, folder)
    return config, values_from(content, config, folder)


def read_config(directory: str | Path) -> SAEConfig:
    """Read what an SAE of our own format is, without its parameters.

    Raises:
        CheckpointError: as `flashsae.SAE.load`.
    """
    folder = expand(directory, "directory")
    description = native.read_description(folder)
    return _config(description, description.sizes, folder)


def load_extras(directory: str | Path) -> dict[str, Tensor]:
    """Read what a saved SAE says of every latent, by name: [d_sae] each; {} if nothing was saved.

    Raises:
        CheckpointError: the folder holds no FlashSAE SAE, or a damaged one.
    """
    return dict(native.read(expand(directory, "directory")).extras)


def unsaved_values(config: SAEConfig, dtype: torch.dtype, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Return what only a training needs, as it is at its start, by name."""
    rows = tuple(row for row in config.architecture.parameters if not row.saved)
    return initial_values(rows, config.sizes, None, dtype, device)
