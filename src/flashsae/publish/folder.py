"""The folder that is pushed: SAEs in our format and in others, their figures and pictures, and the model card.

README.md                the card
flashsae.json, .safetensors    the SAE, so that flashsae.load("hf://REPO") finds it
saelens/ ...             the same in the formats of other libraries
config.toml              the settings of the run
evaluation.json          its figures
pictures/                those of its report

Of several SAEs each has such a folder, NAME/, and the card and its pictures compare them.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flashsae.errors import ConfigError
from flashsae.files.documents import SEAL, load_json, sealed
from flashsae.files.reading import check_sha256
from flashsae.formats.content import Content
from flashsae.formats.native import FORMAT as OURS
from flashsae.formats.registry import format_named
from flashsae.logs.jsonl import LOG_FILE, read_log
from flashsae.metrics import table
from flashsae.places.hub import Place
from flashsae.publish.card import Card
from flashsae.publish.content import (
    EVALUATION_FILE,
    LATENTS_FILE,
    SAE_FILE,
    WEIGHTS_FILE,
    Published,
    published,
)
from flashsae.publish.pictures import alone
from flashsae.report.comparison import Compared, comparing_plots
from flashsae.report.plots import Plot, training_plots
from flashsae.report.render import dictionary_plots, read_arrays
from flashsae.run.exporting import by_hookpoint, with_density, write_several
from flashsae.sae.stored import config_from, write
from flashsae.settings.run import CONFIG_FILE
from flashsae.settings.toml import sealed_toml

CARD_FILE, PICTURES = "README.md", "pictures"
_BY_DEFAULT = ("saelens",)
"""Formats beside ours that are written where they hold an SAE exactly: what most of the field loads."""


@dataclass(frozen=True)
class Asked:
    """How SAEs are published.

    Args:
        formats: beside ours; None: saelens, where it holds all of an SAE.
        license: of the hub's names, for the card; None: the card names none.
    """

    formats: tuple[str, ...] | None = None
    license: str | None = None


def make_folder(
    source: Path, folder: Path, place: Place, asked: Asked, put: Callable[[Path, Path], Any] = shutil.copyfile
) -> tuple[list[Published], list[str]]:
    """Write what is pushed into a folder that is there and empty.

    Args:
        source: folder of a run that has ended, or of an SAE.
        folder: to write into.
        place: where it will stand, for the card.
        asked: in which formats, and under which license.
        put: how the weights of our format get from where they are to where they are to be.
    Returns:
        the SAEs, and sentences on what others will not see.
    Raises:
        CheckpointError: the run has not ended, or something in it is damaged.
        ConfigError: a format cannot hold an SAE, there is no such format, or a setting looks like a secret.
        MissingExtraError: jinja2, matplotlib or pyyaml is not installed.
        StorageError: the file system refused.
    """
    saes, failed = published(source)
    for sae in saes:
        own = folder / sae.name
        own.mkdir(exist_ok=True)
        _write_ours(sae, own, put)
    formats, left_out = _write_others(saes, folder, asked.formats)
    sets = _write_sets(saes, folder, asked.formats or ())
    remarks = [f"{len(failed)} more of the run failed and are not here."] if failed else []
    remarks += left_out
    pictures = _pictures(saes)
    for picture in pictures:
        (folder / PICTURES).mkdir(exist_ok=True)
        (folder / PICTURES / f"{picture.name}.svg").write_text(alone(picture.svg), "utf-8")
    card = Card(place, saes, formats, sets, pictures, remarks, asked.license)
    (folder / CARD_FILE).write_text(card.text(), "utf-8")
    return saes, remarks


def _write_ours(sae: Published, folder: Path, put: Callable[[Path, Path], Any]) -> None:
    """Write an SAE in our format, to the same bytes but for what others should not see, and what its run says."""
    weights = sae.folder / WEIGHTS_FILE
    check_sha256(weights, sae.description.sha256, SAE_FILE, "Put a copy of it back.")
    put(weights.resolve(), folder / WEIGHTS_FILE)
    content = load_json(sae.folder / SAE_FILE)
    if content.get("metadata", {}) == sae.description.metadata:
        shutil.copyfile(sae.folder / SAE_FILE, folder / SAE_FILE)
    else:
        clean = {**content, "metadata": dict(sae.description.metadata)}
        clean = sealed(clean) if SEAL in content else clean
        (folder / SAE_FILE).write_text(json.dumps(clean, indent=2) + "\n", "utf-8")
    if sae.run is not None:
        shutil.copyfile(sae.run / EVALUATION_FILE, folder / EVALUATION_FILE)
        (folder / CONFIG_FILE).write_text(sealed_toml(sae.settings), "utf-8")


def _write_others(
    saes: Sequence[Published], folder: Path, asked: Sequence[str] | None
) -> tuple[dict[str, list[str]], list[str]]:
    """Write SAEs in other formats; return their names by SAE, and sentences on those that cannot hold one."""
    written: dict[str, list[str]] = {sae.name: [] for sae in saes}
    left_out: dict[str, str] = {}
    forms = [format_named(name, written=True) for name in dict.fromkeys(_BY_DEFAULT if asked is None else asked)]
    for sae in saes:
        for form in forms:
            if form is OURS or (form.is_whole and len(saes) > 1):
                continue
            try:
                write(_content(sae), folder / sae.name / form.name, form, lossy=False, overwrite=False)
            except ConfigError as error:
                if asked is not None:
                    raise ConfigError(f"{sae.name}: {error}" if sae.name else str(error)) from error
                left_out.setdefault(str(error), form.title)
            else:
                written[sae.name].append(form.name)
    return written, [f"Not there in the format of {title}: {why}" for why, title in left_out.items()]


def _write_sets(saes: Sequence[Published], folder: Path, asked: Sequence[str]) -> list[str]:
    """Write the SAEs of a run in formats that have all of a model in one folder; return their names."""
    forms = [format_named(name, written=True) for name in dict.fromkeys(asked)]
    whole = [form for form in forms if form.is_whole and len(saes) > 1]
    contents = by_hookpoint({sae.name: _content(sae) for sae in saes}) if whole else {}
    for form in whole:
        write_several(contents, folder / form.name, form, lossy=False, overwrite=False)
    return [form.name for form in whole]


def _content(sae: Published) -> Content:
    """Return what is written of an SAE in other formats.

    Raises:
        CheckpointError: it is damaged.
    """
    content = OURS.read(sae.folder)
    config_from(content, sae.folder)
    return with_density(replace(content, metadata=sae.description.metadata), sae.folder)


def _pictures(saes: Sequence[Published]) -> list[Plot]:
    """Draw how one SAE was trained and what its latents are like, or how several compare."""
    if len(saes) > 1:
        return comparing_plots([Compared(sae.folder, sae.settings, sae.evaluation, None) for sae in saes])
    (sae,) = saes
    if sae.run is None:
        return []
    plots = training_plots(read_log(sae.run / LOG_FILE), sae.evaluation, sae.settings, table(sae.architecture.terms))
    arrays = sae.run / LATENTS_FILE
    plots += dictionary_plots(read_arrays(arrays), sae.evaluation) if arrays.is_file() else []
    return [plot for plot in plots if re.fullmatch(r"[\w-]+", plot.name)]
