"""Activations of a model that is loaded: what to iterate over, to train on and to evaluate with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from flashsae.data.acts import Batch
from flashsae.data.examples import Inputs
from flashsae.data.existing import configured_images
from flashsae.data.images import ImageSource
from flashsae.data.inputs import InputSource
from flashsae.data.language_model import LanguageModelSource
from flashsae.data.sources import StreamSource
from flashsae.data.split import Split
from flashsae.errors import ConfigError, DtypeError
from flashsae.settings.kinds import declared_types
from flashsae.settings.reading import OF_TEXT, ReadingConfig
from flashsae.text.open import open_text

_TAKEN = ("model", "dataset", "hookpoint", "cache_dtype", "cache_compression")
"""Settings of reading that have an argument of their own, or mean nothing here."""
READING = frozenset(declared_types(ReadingConfig)) - {*_TAKEN}
"""The names of settings that may stand beside a model and its texts."""


class ModelActivations:
    """Activations of a model as it reads: iterate over it for batches by site, or give it to `fit` and `evaluate`.

    Args:
        source: where they come from.
        split: of the texts.
    """

    def __init__(self, source: StreamSource, split: Split = "train") -> None:
        self.source, self._split = source, split

    def __iter__(self) -> Iterator[Batch]:
        """Yield the activations of one forward after another: [tokens, d] by site, on the device of the model."""
        return (chunk.acts for chunk, _ in self.source.chunks(self._split) if len(chunk.group))

    @property
    def held_out(self) -> ModelActivations:
        """Those of the texts that training never sees; none where `held_out` was 0."""
        return ModelActivations(self.source, "held_out")


def activations(
    model: nn.Module | str,
    tokenizer: Any = None,
    texts: Any = None,
    *,
    hookpoint: str | Sequence[str],
    inputs: Inputs | None = None,
    held_out: float = 0.0,
    **settings: Any,
) -> ModelActivations:
    """Return the activations of a model at one or several hookpoints, computed while they are read.

        for batch in flashsae.activations(model, tokenizer, texts, hookpoint="h.6"): batch["h.6"]  # [tokens, d]
        sae = flashsae.fit(flashsae.activations(model, tokenizer, texts, hookpoint="h.6"), d_sae=4096, tokens=10**7)
        acts = flashsae.activations(vit, inputs=[{"pixel_values": x}, ...], hookpoint="encoder.layer.6", skip_first=1)

    Args:
        model: a Hugging Face model, with or without its head, on the device where it is to run; or a name, as for
            `flashsae train`.
        tokenizer: of the model, or its image processor where it reads a folder of images; None beside a name.
        texts: a list of strings, a file, a folder, a name on the hub, a data set, a function that returns an iterator,
            or whatever else `flashsae.data.open_text` takes; or what it returned.
        inputs: in place of tokenizer and texts, for models that read something else: a function that returns batches,
            or a DataLoader or list of them. A batch is a dict of tensors, what the model takes by keyword; its entry
            `keep`, [examples, positions] of bool, says which positions to take (see `flashsae.data.InputSource`).
        hookpoint: module paths or patterns such as ``"h.*"``; each is a site.
        held_out: fraction of the texts, or examples, that iterating and training leave out; they are in `.held_out`.
        settings: of reading, by name: context_length, text_column, prepend_bos, ... (`flashsae.data.ReadingConfig`);
            beside inputs, skip_first and max_norm_ratio alone.
    Raises:
        ConfigError: no such setting or hookpoint, or a context that the model cannot read.
        DataError: there is no text.
        MissingExtraError: transformers is not installed.
    """
    unknown = sorted(settings.keys() - READING)
    if unknown:
        raise ConfigError(f"{unknown[0]}: no such setting beside a model; there are {', '.join(sorted(READING))}.")
    if not isinstance(model, nn.Module | str):
        raise DtypeError(f"model: expected a module or a name, got {type(model).__name__}.")
    if inputs is not None:
        _check_inputs_alone(model, tokenizer, texts, settings)
        assert isinstance(model, nn.Module)
        return ModelActivations(InputSource(model, inputs, hookpoint, held_out=held_out, **settings))
    if texts is None:
        raise ConfigError(
            "texts: expected what the model reads: a list of strings, a file, a folder or a name, or inputs=..., a "
            "function that returns batches of another kind."
        )
    if isinstance(model, nn.Module) and tokenizer is None:
        raise ConfigError("tokenizer: expected that of the model, got None. Load it: AutoTokenizer.from_pretrained.")
    names = [hookpoint] if isinstance(hookpoint, str) else list(hookpoint)
    name = model if isinstance(model, str) else getattr(model, "name_or_path", "") or type(model).__name__
    loaded = None if isinstance(model, str) else (model, getattr(tokenizer, "image_processor", tokenizer))
    if isinstance(texts, str | Path) and (loaded is None or hasattr(loaded[1], "preprocess")):
        config = ReadingConfig(name, str(texts), hookpoint=", ".join(names), **settings)
        images = configured_images(config, are_meant=loaded is not None)
        if images is not None:
            return ModelActivations(ImageSource(config.filled(), images, held_out=held_out, loaded=loaded))
    of_text = {name.removeprefix("text_"): settings.pop(name) for name in OF_TEXT if name in settings}
    config = ReadingConfig(name, hookpoint=", ".join(names), **settings)
    text = open_text(texts, **of_text)
    loaded = None if isinstance(model, str) else (model, tokenizer)
    return ModelActivations(LanguageModelSource(config, text, held_out=held_out, loaded=loaded))


_OF_INPUTS = ("skip_first", "max_norm_ratio")


def _check_inputs_alone(model: nn.Module | str, tokenizer: Any, texts: Any, settings: dict[str, Any]) -> None:
    """Raise ConfigError where beside inputs something is given that means nothing for them."""
    if isinstance(model, str):
        raise ConfigError(f"model: expected a module beside inputs, got the name {model!r}. Load it first.")
    beside = {"tokenizer": tokenizer, "texts": texts, **{n: v for n, v in settings.items() if n not in _OF_INPUTS}}
    given = [name for name, value in beside.items() if value is not None]
    if given:
        raise ConfigError(f"{given[0]}: expected nothing beside inputs, which the model reads as they are.")
