"""SAEs written for other libraries: what a run of ours exports at its end."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from flashsae.errors import ConfigError
from flashsae.files import atomic
from flashsae.files.documents import load_tensors
from flashsae.formats import native
from flashsae.formats.checks import folder_name
from flashsae.formats.content import Content, Format
from flashsae.formats.registry import format_named
from flashsae.sae.config import SAEConfig
from flashsae.sae.module import SAE
from flashsae.sae.saved import content_of
from flashsae.sae.stored import OVERWRITE, check_numbers, check_replaceable, check_written, write
from flashsae.settings.normalization import BY_TOKEN
from flashsae.train.config import TrainConfig

DENSITY = "latent_density"
_OF_A_RUN = "sae"
_LATENTS = "latents.safetensors"


def check_names(names: Iterable[str]) -> None:
    """Raise ConfigError unless all are formats that can be written."""
    for name in names:
        try:
            check_written(format_named(name, written=True))
        except ConfigError as error:
            raise ConfigError(str(error).replace("format:", "export:", 1)) from error


def check_held(names: Iterable[str], planned: Mapping[str, tuple[TrainConfig, Mapping[str, Any]]]) -> None:
    """Raise ConfigError where a format cannot hold what a run will have trained, before it is.

    SAEs of these kinds and next to no width are written for it, and thrown away.

    Args:
        names: of formats.
        planned: resolved settings and metadata of each SAE, by its name.
    """
    contents = {name: _stand_in(*each) for name, each in planned.items()}
    for form in map(format_named, names):
        try:
            with tempfile.TemporaryDirectory() as folder:
                if form.is_whole and form.write_set is not None:
                    form.write_set(Path(folder), by_hookpoint(contents), False)
                    continue
                for number, content in enumerate(contents.values()):
                    (place := Path(folder, str(number))).mkdir()
                    check_written(form)(place, content, False)
        except ConfigError as error:
            later = f"convert the run behind its end (flashsae convert RUN DST --to {form.name} --lossy)"
            raise ConfigError(f"export: {str(error).replace('give --lossy (lossy=True)', later)}") from error


def _stand_in(config: TrainConfig, metadata: Mapping[str, Any]) -> Content:
    """Return what will be trained, with two coordinates a site in the place of all."""
    arch, widths = config.arch, getattr(config.arch, "widths", None)
    narrow = 2 * len(widths or "x")
    sae = SAE(
        SAEConfig(
            narrow,
            config.d_sae,
            arch=replace(arch, widths=(2,) * len(widths)) if widths else arch,
            d_out=narrow + (config.d_in != config.d_out),
            normalize_activations=config.normalize_activations if config.normalize_activations in BY_TOKEN else "none",
            apply_b_dec_to_input=config.apply_b_dec_to_input,
        )
    )
    for row in sae.architecture.parameters:
        if row.saved and not row.trained:
            getattr(sae, row.name).fill_(1.0)  # as if steps had been done
    return content_of(sae, metadata, {DENSITY: torch.zeros(config.d_sae, dtype=torch.float32, device="cpu")})


def read_saved(folder: Path) -> Content:
    """Return the SAE in the folder of a run, with how often its latents are active where that is known."""
    return with_density(native.read(folder / _OF_A_RUN), folder / _OF_A_RUN)


def with_density(content: Content, path: Path) -> Content:
    """Return an SAE with how often its latents are active, where the run that made it has measured that.

    Args:
        content: the SAE.
        path: where it was read from.
    """
    measured = path.parent / _LATENTS
    if path.name != _OF_A_RUN or not measured.exists():
        return content
    found = load_tensors(measured).get(DENSITY, torch.empty(0, dtype=torch.float32, device="cpu"))
    is_known = found.shape == (content.d_sae,) and DENSITY not in content.extras
    return replace(content, extras={**content.extras, DENSITY: found}) if is_known else content


def is_exported_alone(names: Iterable[str]) -> bool:
    """Tell whether all formats have an SAE by itself."""
    return not any(format_named(name).is_whole for name in names)


def is_exported(folder: Path, names: Iterable[str]) -> bool:
    """Tell whether the SAE in a folder is there in all formats that have one by itself."""
    return all((folder / name).is_dir() for name in names if not format_named(name).is_whole)


def export_one(folder: Path, names: Iterable[str]) -> list[Path]:
    """Write the SAE in a folder of a run beside it, in formats that have one by itself; return where.

    Raises:
        StorageError: something else stands there, or the file system refused.
    """
    forms = [form for form in map(format_named, names) if not form.is_whole]
    content = read_saved(folder) if forms else None
    for form in forms:
        assert content is not None
        place = folder / form.name
        write(content, place, form, lossy=False, overwrite=place.exists())
    return [folder / form.name for form in forms]


def export_set(run: Path, folders: Sequence[Path], names: Iterable[str]) -> list[Path]:
    """Write the SAEs of a run in formats that have all of a model in one folder; return where.

    Raises:
        StorageError: something else stands there, or the file system refused.
    """
    forms = [form for form in map(format_named, names) if form.is_whole]
    contents = by_hookpoint({folder.name: read_saved(folder) for folder in folders}) if forms else {}
    for form in forms:
        write_several(contents, run / form.name, form, lossy=False, overwrite=True)
    return [run / form.name for form in forms]


def by_hookpoint(contents: Mapping[str, Content]) -> dict[str, Content]:
    """Return SAEs by where they read, where that tells them apart."""
    names = set_names({name: content.metadata for name, content in contents.items()})
    return {names[name]: content for name, content in contents.items()}


def set_names(metadata: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Return what SAEs are called in a set, by their names: where they read, where that tells them apart."""
    hookpoints = {name: str(each.get("hookpoint", name)) for name, each in metadata.items()}
    is_told = len(set(hookpoints.values())) == len(hookpoints)
    return hookpoints if is_told else {name: name for name in metadata}


def write_several(
    contents: Mapping[str, Content], directory: Path, form: Format, *, lossy: bool, overwrite: bool
) -> list[str]:
    """Write several SAEs to a folder, all or nothing: as one set, or each to a folder of its name.

    Args:
        contents: by name, of which none leads out of the folder.
        directory: must not exist, unless `overwrite` and it holds nothing that is not written again.
        form: what to write.
        lossy: let the format give up what it cannot hold.
        overwrite: replace what is there.
    Returns:
        a sentence for each thing that was given up.
    Raises:
        ConfigError: the format cannot hold them.
        StorageError: the folder exists, holds other files, or cannot be written.
    """
    is_there = overwrite and directory.exists()
    for content in contents.values():
        check_numbers(content, form)
    with atomic.atomic_directory(directory, overwrite=overwrite, advice=OVERWRITE) as folder:
        if form.write_set is not None:
            told = form.write_set(folder, contents, lossy)
        else:
            told = []
            for name, content in contents.items():
                (place := folder / folder_name(name)).mkdir(parents=True)
                told += [f"{name}: {each}" for each in check_written(form)(place, content, lossy)]
        if is_there:
            check_replaceable(directory, folder)
    return told
