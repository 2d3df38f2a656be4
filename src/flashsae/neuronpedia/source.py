"""What Neuronpedia is to call an SAE, and what a run knows of it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashsae.errors import CheckpointError, ConfigError
from flashsae.formats.hook_names import layer_of
from flashsae.report.snippet_file import Snippets, read_snippets
from flashsae.settings.run import load_settings

_ID = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_THERE = {"gpt2": "gpt2-small"}
"""Models that Neuronpedia calls otherwise than the hub."""


@dataclass(frozen=True)
class NamedSource:
    """An SAE by the names of Neuronpedia.

    Args:
        model_id: such as gpt2-small.
        set_name: of SAEs of several layers, such as res-16k-mine.
        layer: the block whose activations it reads.
    """

    model_id: str
    set_name: str
    layer: int

    @property
    def id(self) -> str:
        """Its name: LAYER-SET."""
        return f"{self.layer}-{self.set_name}"

    @classmethod
    def of(cls, settings: dict[str, Any], set_name: str, model_id: str | None, layer: int | None) -> NamedSource:
        """Return the names of the SAE of a run.

        Args:
            settings: of the run.
            set_name: of the set.
            model_id: None: by the name of the model.
            layer: None: the number in the hookpoint.
        Raises:
            ConfigError: a name cannot be one there, or nothing tells it.
        """
        model = str(settings.get("model") or "").rstrip("/").rpartition("/")[2].lower()
        return cls(
            _checked("model_id", _THERE.get(model, model) if model_id is None else model_id, "such as gpt2-small"),
            _checked("set", set_name, "such as res-16k-mine"),
            _layer(settings) if layer is None else layer,
        )


def _checked(name: str, value: str, example: str) -> str:
    if not re.fullmatch(_ID, value):
        raise ConfigError(
            f"{name}: expected a name of letters and digits, with . _ - between them, {example}, got {value!r}."
        )
    return value


def _layer(settings: dict[str, Any]) -> int:
    hookpoints = str(settings.get("hookpoint") or "")
    layers = {layer_of(each.strip()) for each in hookpoints.split(",")}
    if len(layers) != 1 or None in layers:
        raise ConfigError(
            f"layer: {hookpoints or 'the hookpoint'} tells no one layer, which is part of the name of a source: give "
            "its number."
        )
    return int(next(iter(layers)) or 0)


def read_run(run: Path) -> tuple[dict[str, Any], Snippets]:
    """Return the settings of a finished run, and the texts that activate its latents.

    Raises:
        CheckpointError: it is none, it has not ended, or a file of it is damaged.
        ConfigError: it has several SAEs, or has read no text.
    """
    if not (run / "config.toml").is_file():
        raise CheckpointError(f"{run} is not the folder of a training run: it has no config.toml.")
    settings = load_settings(run / "config.toml")
    parts = sorted(path.parent.name for path in run.glob("*/snippets.json"))
    if parts and not (run / "snippets.json").exists():
        raise ConfigError(f"{run} holds several SAEs: name the folder of one, such as {run / parts[0]}.")
    if not (run / "snippets.json").exists():
        if not settings.get("model"):
            raise ConfigError(
                f"{run} knows no texts, as it was trained on activations alone: Neuronpedia shows texts that activate "
                "latents."
            )
        raise CheckpointError(
            f"{run} has no snippets.json, so its training has not finished: finish it with `flashsae train --resume "
            f"{run}`."
        )
    snippets = read_snippets(run / "snippets.json")
    if snippets.pictures:
        raise ConfigError(f"{run} has read images, and Neuronpedia shows texts that activate latents.")
    if not snippets.latents:
        raise ConfigError(f"{run} has no latent that was active on a text: there is nothing to show.")
    return settings, snippets
