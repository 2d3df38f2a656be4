"""SAEs in folders: what is written of one, and read again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashsae.architecture import settings_of
from flashsae.errors import CheckpointError, ConfigError, DtypeError
from flashsae.formats import native
from flashsae.ops.validate import check_shape
from flashsae.sae.config import SAEConfig
from flashsae.sae.initial import initial_values
from flashsae.settings.kinds import as_json, check, expand
from flashsae.settings.normalization import LAYER_NORM


def write(
    config: SAEConfig,
    parameters: Mapping[str, Tensor],
    directory: str | Path,
    metadata: Mapping[str, Any],
    extras: Mapping[str, Tensor],
    *,
    overwrite: bool,
) -> None:
    """Write an SAE to a folder: `flashsae.SAE.save`.

    Args:
        config: what it is.
        parameters: all of them, by name.
        directory: must not exist, unless `overwrite`.
        metadata: anything JSON can hold.
        extras: [d_sae] each.
        overwrite: replace the folder, if it holds an SAE and nothing else.
    """
    check("overwrite", overwrite, bool)
    dtype = parameters["W_dec"].dtype
    for name, tensor in parameters.items():
        if tensor.dtype != dtype:
            raise DtypeError(
                f"{name}: expected {dtype}, the dtype of W_dec, got {tensor.dtype}. Convert the SAE first: "
                "sae.float().save(...)."
            )
    for name, extra in extras.items():
        check_shape(f"extras: {name}", extra, (config.d_sae,))
    content = {
        "architecture": config.architecture.name,
        "settings": as_json(asdict(config.arch)),
        "apply_b_dec_to_input": config.architecture.subtracts_b_dec,
        "dtype": str(dtype).removeprefix("torch."),
        **config.sizes,
        **({"normalize_activations": LAYER_NORM} if config.normalize_activations == LAYER_NORM else {}),
        "metadata": metadata,
    }
    native.write(expand(directory, "directory"), parameters, content, extras, overwrite=overwrite)


def read(directory: str | Path) -> tuple[SAEConfig, dict[str, Tensor]]:
    """Read what an SAE is, and its parameters, which are checked to be those that it has.

    Raises:
        CheckpointError: as `flashsae.SAE.load`.
    """
    folder = expand(directory, "directory")
    description, tensors = native.read(folder)
    config = _config_of(folder, description)
    dtype = getattr(torch, description.dtype)
    table = config.architecture.parameters
    like = initial_values(tuple(row for row in table if row.saved), config.sizes, None, dtype, "meta")
    native.check_tensors(folder, tensors, like)
    return config, tensors | unsaved_values(config, dtype)


def unsaved_values(config: SAEConfig, dtype: torch.dtype, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Return what only a training needs, as it is at its start, by name."""
    rows = tuple(row for row in config.architecture.parameters if not row.saved)
    return initial_values(rows, config.sizes, None, dtype, device)


def read_config(directory: str | Path) -> SAEConfig:
    """Read what an SAE is, without its parameters.

    Raises:
        CheckpointError: as `flashsae.SAE.load`.
    """
    folder = expand(directory, "directory")
    return _config_of(folder, native.read_description(folder))


def load_extras(directory: str | Path) -> dict[str, Tensor]:
    """Read what a saved SAE says of every latent, by name: [d_sae] each; {} if nothing was saved.

    Raises:
        CheckpointError: the folder holds no FlashSAE SAE, or a damaged one.
    """
    return native.read_extras(expand(directory, "directory"))


def _config_of(folder: Path, description: native.Description) -> SAEConfig:
    try:
        config = SAEConfig(
            description.d_in,
            description.d_sae,
            arch=settings_of(description.architecture, **description.settings),
            d_out=description.d_out,
            normalize_activations=description.normalize_activations,
        )
        if config.architecture.subtracts_b_dec != description.apply_b_dec_to_input:
            raise ConfigError(f"{config.architecture.title} is not what wrote it: apply_b_dec_to_input differs.")
    except ConfigError as error:
        raise CheckpointError(f"{folder} cannot be read here: {error}") from error
    return config
