"""What others get to see of an SAE: its settings and figures, without what they tell of the machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from flashsae.architecture import Architecture, architecture_named
from flashsae.errors import CheckpointError, ConfigError
from flashsae.files.documents import load_json
from flashsae.formats.native import Description, read_description
from flashsae.logs.jsonl import LOG_FILE, read_log
from flashsae.publish.cleaning import cleaned
from flashsae.report.evaluation_file import read_evaluation
from flashsae.run.parts import part_folders
from flashsae.settings.run import CONFIG_FILE, load_settings
from flashsae.train.failure import failure_in

SAE_FILE, WEIGHTS_FILE = "flashsae.json", "flashsae.safetensors"
EVALUATION_FILE, LATENTS_FILE = "evaluation.json", "latents.safetensors"
_OF_A_RUN = "sae"


@dataclass(frozen=True)
class Published:
    """An SAE that is published.

    Args:
        name: of its folder in the repository; "" where it is the only one.
        folder: that it lies in.
        run: that made it; None where it is alone.
        description: of its flashsae.json, the metadata as others may see them.
        version: of FlashSAE that wrote it.
        settings: of config.toml, as others may see them; {} without a run.
        evaluation: its figures; {} without a run.
        shortened: names of settings of which only the last part of a path is left.
    """

    name: str
    folder: Path
    run: Path | None
    description: Description
    version: str
    settings: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    shortened: tuple[str, ...] = ()

    @property
    def architecture(self) -> Architecture:
        """What is known of its kind."""
        return architecture_named(self.description.architecture)

    def told(self, name: str) -> str:
        """Return what is known of the model, the hookpoint or the data set; "" where nothing is."""
        value = self.settings.get(name) or self.description.metadata.get(name) or ""
        return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def published(source: Path) -> tuple[list[Published], list[str]]:
    """Return the SAEs of a run, or one that lies in a folder alone; and the names of those that failed.

    Args:
        source: folder of a run, or one that `SAE.save` wrote.
    Raises:
        CheckpointError: it is neither, the run has not ended, or something in it is damaged.
        ConfigError: something in it looks like a secret.
    """
    if (source / SAE_FILE).is_file():
        return [_published("", source, None)], []
    folders = part_folders(source)
    if not folders and not (source / CONFIG_FILE).is_file():
        raise CheckpointError(
            f"{source} is neither the folder of a run nor an SAE of ours: expected {CONFIG_FILE} or {SAE_FILE} in it. "
            "Name such a folder; flashsae convert makes an SAE of ours from one of another library."
        )
    failed = [folder.name for folder in folders if failure_in(folder) is not None]
    going = [folder for folder in folders if folder.name not in failed]
    if folders and not going:
        raise CheckpointError(f"{source}: all of its SAEs failed, so there is nothing to push.")
    if not folders:
        return [_of_run("", source, source)], []
    return [_of_run(folder.name, folder, source) for folder in going], failed


def _of_run(name: str, folder: Path, run: Path) -> Published:
    sae = folder / _OF_A_RUN
    if not (sae / SAE_FILE).is_file() or not (folder / EVALUATION_FILE).is_file():
        raise CheckpointError(
            f"{folder} holds no SAE that is measured, so its training has not ended: finish it with "
            f"`flashsae train --resume {run}`, then push it."
        )
    evaluation = read_evaluation(folder / EVALUATION_FILE)
    steps = max((record["step"] for record in read_log(folder / LOG_FILE)), default=evaluation["steps"])
    if steps != evaluation["steps"]:
        raise CheckpointError(
            f"{folder}: its figures are not of the end of its log: finish it with `flashsae train --resume {run}`, "
            "then push it."
        )
    shortened: list[str] = []
    settings = cleaned(load_settings(folder / CONFIG_FILE), CONFIG_FILE, shortened)
    return _published(name, sae, folder, settings=settings, evaluation=evaluation, shortened=shortened)


def _published(
    name: str,
    folder: Path,
    run: Path | None,
    *,
    settings: Mapping[str, Any] | None = None,
    evaluation: Mapping[str, Any] | None = None,
    shortened: list[str] | None = None,
) -> Published:
    description = read_description(folder)
    shortened = shortened or []
    metadata = cleaned(description.metadata, SAE_FILE, shortened)
    try:
        architecture_named(description.architecture)
    except ConfigError as error:
        raise CheckpointError(f"{folder} cannot be described here: {error}") from error
    version = load_json(folder / SAE_FILE).get("flashsae_version", "unknown")
    return Published(
        name,
        folder,
        run,
        Description(**{**asdict(description), "metadata": metadata}),
        str(version),
        dict(settings or {}),
        dict(evaluation or {}),
        tuple(shortened),
    )
