"""From settings to a source of activations: a cache that exists, a cache to be written now, or a model that streams."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flashsae.data.cache import ActivationCache
from flashsae.data.cache_writer import write_cache
from flashsae.data.language_model import LanguageModelConfig, LanguageModelSource
from flashsae.data.models import match_hookpoints
from flashsae.data.sources import Chunk, Source, Split
from flashsae.data.text import TextDataset, open_text
from flashsae.errors import ConfigError, DataError
from flashsae.settings.reading import ActivationsConfig, ReadingConfig

LARGEST_DEFAULT_CACHE = 8 * 10**9
MODEL_BATCH_TOKENS = 8192


@dataclass(frozen=True)
class Opened:
    """Activations that are ready to be read.

    Args:
        sources: by hookpoint.
        tokenizer: that of the model; called, because loading it takes a moment.
    """

    sources: dict[str, Source]
    tokenizer: Callable[[], Any]

    def text_chunks(self, hookpoint: str, split: Split) -> Iterator[Chunk]:
        """Yield the chunks of a split, with token ids."""
        return (chunk for chunk, _ in self.sources[hookpoint].chunks(split))


Progress = Callable[[int], None]


@dataclass(frozen=True)
class Prepared:
    """Activations of which everything is known and checked, before the long work of computing them.

    Args:
        widths: d_in by hookpoint.
        config: the settings that led here, filled in.
        how: where they come from, for the plan.
        open: does the long work: called with a function that hears of the rows cached so far.
        cache_bytes: size of the cache, at most; 0 for a stream.
        row_bytes: of the activations of a token in the shuffle buffer of a stream; a cache needs no buffer.
        model_bytes: of the language model, if it stays in memory beside the training.
        opened: the activations, where no long work is left.
    """

    widths: dict[str, int]
    config: ActivationsConfig
    how: str
    open: Callable[[Progress], Opened]
    cache_bytes: int = 0
    row_bytes: int = 0
    model_bytes: int = 0
    opened: Opened | None = None


def prepare_activations(
    config: ActivationsConfig, *, tokens: int, folder: Path, device: str, is_checked: bool = False
) -> Prepared:
    """Find the activations that settings ask for, or what has to be done to get them.

    Args:
        config: what to read.
        tokens: tokens that will be trained on; no more than these, and the held-out ones beside them, are cached.
        folder: where a cache goes if the settings name no place.
        device: for the model.
        is_checked: an earlier call found that the cache fits the settings; do not open the text to compare again.
    Raises:
        ConfigError: no such model or hookpoint, or settings that exclude each other.
        DataError: the text is missing or empty, or the cache holds something else than is asked for.
        CheckpointError: the cache is damaged.
    """
    if config.activations is not None and ActivationCache.is_complete(config.activations):
        return _prepare_cache(config if is_checked else _check_asked(config, config.activations), config.activations)
    config = config.filled()
    text = _open_text(config)
    rows = int(tokens / (1 - config.held_out))
    reading = _language_model_config(config, device)
    place = config.activations or folder / _cache_name(config, reading, text, rows)
    if not config.stream and ActivationCache.is_complete(place):
        return _prepare_cache(config, place)
    source = LanguageModelSource(reading, text, held_out=config.held_out)
    size = 2 * rows * sum(source.widths.values())
    is_too_large = config.stream is None and config.activations is None and size > LARGEST_DEFAULT_CACHE
    if config.stream or is_too_large:
        if len(source.hookpoints) > 1:
            raise ConfigError(
                f"hookpoint: expected one module for a stream, got {', '.join(source.hookpoints)}. For several SAEs "
                f"at once give --activations FOLDER instead of --stream (a cache of about {size / 1e9:.0f} GB)."
            )
        opened = Opened({source.hookpoints[0]: source}, lambda: source.tokenizer)
        how = f"{text.name}, streamed beside the training"
        row_bytes = source.d_in * source.dtype.itemsize
        return Prepared(
            source.widths, config, how, lambda _: opened, row_bytes=row_bytes, model_bytes=source.model_bytes
        )

    def write_and_open(on_progress: Progress) -> Opened:
        write_cache(place, source, max_tokens=rows, on_progress=on_progress)
        return _prepare_cache(config, place).open(on_progress)

    config = replace(config, activations=place.resolve())
    how = f"{text.name}, to be cached in {place}: {rows:,} tokens at most"
    return Prepared(source.widths, config, how, write_and_open, cache_bytes=size)


def cache_activations(
    config: ReadingConfig, place: Path, *, max_tokens: int | None, device: str, on_progress: Progress | None = None
) -> None:
    """Write a cache, or go on with one: see `write_cache`. Arguments as for `prepare_activations`."""
    config = config.filled()
    source = LanguageModelSource(_language_model_config(config, device), _open_text(config), held_out=0.0)
    write_cache(place, source, max_tokens=max_tokens, on_progress=on_progress)


def _open_text(config: ReadingConfig) -> TextDataset:
    assert config.dataset is not None
    return open_text(config.dataset, split=config.text_split, column=config.text_column, subset=config.text_subset)


def _language_model_config(config: ReadingConfig, device: str) -> LanguageModelConfig:
    assert config.model is not None
    assert config.hookpoint is not None
    assert config.context_length is not None
    return LanguageModelConfig(
        config.model,
        (config.hookpoint,),
        context_length=config.context_length,
        batch_tokens=max(MODEL_BATCH_TOKENS, config.context_length),
        mask_special=config.mask_special is not False,
        max_norm_ratio=config.max_norm_ratio,
        device=device,
    )


def _cache_name(config: ReadingConfig, reading: LanguageModelConfig, text: TextDataset, rows: int) -> str:
    """Return a folder name that differs wherever the cached bytes would, also between bfloat16 and float32 models."""
    settings = (config.model, config.hookpoint, config.context_length, config.mask_special, config.max_norm_ratio)
    how_read = (reading.batch_tokens, str(reading.resolved_dtype()))
    digest = hashlib.sha256(repr((*settings, *how_read, text.name, rows)).encode()).hexdigest()[:8]
    return f"{run_name(config)}-{digest}"


def run_name(config: ReadingConfig) -> str:
    """Return a readable name for what is trained on, fit for a folder."""
    filled = config.filled()
    return f"{Path(filled.model or '').name}-{filled.hookpoint}".replace("*", "all")


def _prepare_cache(config: ActivationsConfig, place: Path) -> Prepared:
    names = list(ActivationCache.read_settings(place)["hookpoints"])
    if config.hookpoint is not None:
        names = match_hookpoints(config.hookpoint, names) or [config.hookpoint]  # the cache says what it holds instead
    caches = {name: ActivationCache(place, name, config.held_out) for name in names}
    first = next(iter(caches.values()))
    opened = Opened(dict(caches), first.read_tokenizer)
    widths = {name: cache.d_in for name, cache in caches.items()}
    size = 2 * first.n_rows * sum(widths.values())
    how = f"{first.dataset}: {first.n_rows:,} tokens, cached in {place}"
    config = replace(config, activations=place.resolve())
    return Prepared(widths, config, how, lambda _: opened, cache_bytes=size)


def _check_asked(config: ActivationsConfig, place: Path) -> ActivationsConfig:
    """Return the settings with those of a cache filled in; raise DataError where others were given."""
    held = ActivationCache.read_settings(place)
    asked = {
        "model": config.model,
        "dataset": None if config.dataset is None else _open_text(config).name,
        "context_length": config.context_length,
        "mask_special": config.mask_special,
        "max_norm_ratio": config.max_norm_ratio,
    }
    differences = [
        f"{name} is {held[name]!r} there, {value!r} was asked for"
        for name, value in asked.items()
        if value is not None and held[name] != value
    ]
    if differences:
        raise DataError(
            f"the cache {place} holds other activations: {'; '.join(differences)}. Leave these settings out, or name "
            "another folder."
        )
    hookpoint = config.hookpoint or next(iter(held["hookpoints"]))
    return replace(config, model=held["model"], hookpoint=hookpoint, context_length=held["context_length"])
