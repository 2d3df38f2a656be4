"""From settings to a source of activations: a cache that exists, a cache to be written now, or a model that streams."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from flashsae.data.cache import ActivationCache
from flashsae.data.cache_index import FORMAT_VERSION, TOKENIZER_FOLDER
from flashsae.data.cache_writer import SHARD_ROWS, cache_bytes, cache_settings, write_cache
from flashsae.data.existing import (
    check_asked,
    check_unfinished,
    is_cache,
    is_complete_cache,
    open_configured_text,
    rounding_warning,
    stored_in_words,
    to_be_stored_in_words,
)
from flashsae.data.image_files import ImageFolder
from flashsae.data.images import IMAGES, ImageSource, Pictures
from flashsae.data.language_model import LanguageModelSource, dtype_of_model
from flashsae.data.moved import moved_place
from flashsae.data.prepared import Activations, AskedSites, Prepared, Progress, arranged, asking
from flashsae.data.split import check_splits
from flashsae.files.fingerprint import text_digest
from flashsae.lm.options import LoadOptions, quantized_sentence
from flashsae.lm.tally import inputs_in_words
from flashsae.lm.weights import model_fingerprint
from flashsae.settings.reading import ActivationsConfig, ReadingConfig, defaults_of_later
from flashsae.text.dataset import TextDataset

LARGEST_DEFAULT_CACHE = 8 * 10**9


def prepare_activations(
    config: ActivationsConfig,
    *,
    tokens: int,
    folder: Path,
    device: str,
    is_checked: bool = False,
    asked: Sequence[AskedSites] | None = None,
) -> Prepared:
    """Find the activations that settings ask for, or what has to be done to get them.

    Args:
        config: what to read.
        tokens: tokens that will be trained on; no more than these, and the held-out ones beside them, are cached.
        folder: where a cache goes if the settings name no place.
        device: for the model.
        is_checked: an earlier call found that the cache fits the settings; do not open the text to compare again.
        asked: what the SAEs read; None is one for each hookpoint of `config`.
    Raises:
        ConfigError: no such model or hookpoint, hookpoints that make no SAE, or settings that exclude each other.
        DataError: the text is missing or empty, or the cache holds something else than is asked for.
        CheckpointError: the cache is damaged, or is not complete and has other settings.
    """
    asked = [each.spread() for each in ([AskedSites(config.hookpoint)] if asked is None else asked)]
    config = asking(config, asked)
    named = config.activations
    if named is not None and is_checked:
        named = moved_place(config, named, folder)
        config = replace(config, activations=named)
    if named is not None and is_complete_cache(config):
        return _cached(config if is_checked else check_asked(config, named), named, asked)
    asked = [each.filled(config) for each in asked]
    config = asking(config, asked).filled()
    text = open_configured_text(config)
    check_splits(text, config.held_out)
    rows = int(tokens / (1 - config.held_out))
    place = named
    if place is None and not config.stream:
        place = folder / _cache_name(config, text, rows, device)
    if place is not None and ActivationCache.is_complete(place):
        return _cached(config, place, asked)
    if named is not None:
        check_unfinished(named, {"model": config.model, "text_fingerprint": text.fingerprint})
    source = _source(config, text, config.held_out, device)
    arranged(asked, source.hookpoints)
    if named is not None:
        wanted = cache_settings(source, SHARD_ROWS, rows, config.cache_dtype, config.cache_compression)
        check_unfinished(named, {**defaults_of_later(), **wanted})
    size = cache_bytes(source.widths, rows, "bf16" if config.stream else config.cache_dtype)
    is_too_large = config.stream is None and named is None and size > LARGEST_DEFAULT_CACHE
    if place is None or is_too_large:
        # so that a part of a run whose cache would be too large is streamed too, were it small enough by itself
        left_open: dict[str, Any] = {"cache_dtype": None, "cache_compression": None}
        streamed = replace(config, stream=True, **left_open)
        return _streamed(streamed, source, asked)
    return _to_be_cached(config, source, place, rows, size, asked)


def _source(
    config: ReadingConfig, text: TextDataset | ImageFolder, held_out: float, device: str
) -> LanguageModelSource | ImageSource:
    """Load the model that reads a text, or images."""
    if isinstance(text, ImageFolder):
        return ImageSource(config, text, held_out=held_out, device=device)
    return LanguageModelSource(config, text, held_out=held_out, device=device)


def _cached(config: ActivationsConfig, place: Path, asked: Sequence[AskedSites]) -> Prepared:
    """Return the activations of a complete cache."""
    saes, of_each = arranged(asked, list(ActivationCache.read_settings(place)["hookpoints"]))
    caches = {name: ActivationCache(place, names, config.held_out) for name, names in saes.items()}
    first = next(iter(caches.values()))
    warnings = (*_of_quantized(first.settings), *filter(None, map(rounding_warning, caches.values())))
    of_images = first.settings.get("reads") == IMAGES
    ready = Activations(
        dict(caches),
        partial(Pictures.load, place / TOKENIZER_FOLDER, first.dataset)
        if of_images
        else partial(first.read_tokenizer, trust_remote_code=bool(config.trust_remote_code)),
        lambda hookpoints: ActivationCache(place, hookpoints, config.held_out),
        warnings,
    )
    widths = {name: cache.widths for name, cache in caches.items()}
    size = sum(cache.stored_bytes for cache in caches.values())
    told = f"{first.dataset}: {first.n_rows:,} tokens, cached in {place} as {stored_in_words(list(caches.values()))}"
    config = replace(config, activations=place.resolve())
    words = str(first.settings.get("inputs")) if of_images else inputs_in_words(first.settings)
    return Prepared(
        widths,
        asked,
        of_each,
        config,
        told,
        lambda: words,
        lambda _: ready,
        cache_bytes=size,
        ready=ready,
        of_images=of_images,
    )


def _streamed(
    config: ActivationsConfig, source: LanguageModelSource | ImageSource, asked: Sequence[AskedSites]
) -> Prepared:
    """Return the activations of a model that reads the text beside the training, once for all SAEs."""
    saes, of_each = arranged(asked, source.hookpoints)
    parts = {name: source.at(*hookpoints) for name, hookpoints in saes.items()}
    ready = Activations(
        dict(parts), lambda: source.tokenizer, lambda hookpoints: source.at(*hookpoints), source.warnings
    )
    return Prepared(
        {name: part.widths for name, part in parts.items()},
        asked,
        of_each,
        config,
        f"{_text_of(source)}, streamed beside the training",
        source.inputs_in_words,
        lambda _: ready,
        row_bytes=source.at(*dict.fromkeys(site for group in saes.values() for site in group)).row_bytes,
        model_bytes=source.model_bytes,
        ready=ready,
        of_images=isinstance(source, ImageSource),
    )


def _text_of(source: LanguageModelSource | ImageSource) -> str:
    """Return the name of a text, and the order in which it is read where that is not the usual one."""
    return source.text.name + (", in an order over the whole of it" if source.config.shuffle_whole else "")


def _to_be_cached(
    config: ActivationsConfig,
    source: LanguageModelSource | ImageSource,
    place: Path,
    rows: int,
    size: int,
    asked: Sequence[AskedSites],
) -> Prepared:
    """Return the activations of a cache that is yet to be written."""

    def write_and_open(on_progress: Progress) -> Activations:
        write_cache(place, source, max_tokens=rows, **_storing(config), on_progress=on_progress)
        ready = _cached(config, place, asked).compute(on_progress)
        return replace(ready, warnings=tuple(dict.fromkeys((*source.warnings, *ready.warnings))))

    told = f"{_text_of(source)}, to be cached in {place}: {rows:,} tokens at most{to_be_stored_in_words(config)}"
    config = replace(config, activations=place.resolve())
    saes, of_each = arranged(asked, source.hookpoints)
    widths = {name: {site: source.widths[site] for site in hookpoints} for name, hookpoints in saes.items()}
    of_images = isinstance(source, ImageSource)
    words = source.inputs_in_words
    return Prepared(widths, asked, of_each, config, told, words, write_and_open, cache_bytes=size, of_images=of_images)


def cache_activations(
    config: ReadingConfig,
    place: Path,
    *,
    max_tokens: int | None,
    device: str,
    on_progress: Progress | None = None,
    on_inputs: Callable[[str], None] | None = None,
) -> tuple[str, ...]:
    """Write a cache, or continue one: see `write_cache`. Arguments as for `prepare_activations`.

    Args:
        on_inputs: called with what the model is to read, in words, before it does.
    Returns:
        sentences on what may spoil results.
    """
    config = config.filled()
    if place.exists():
        is_cache(place)
    text = open_configured_text(config)
    check_splits(text, None)
    held_out = ActivationsConfig.held_out if config.pack else 0.0
    source = _source(config, text, held_out, device)
    if on_inputs is not None:
        on_inputs(source.inputs_in_words())
    write_cache(place, source, max_tokens=max_tokens, **_storing(config), on_progress=on_progress)
    rounded = filter(None, (rounding_warning(ActivationCache(place, name)) for name in source.hookpoints))
    return (*source.warnings, *rounded)


def _of_quantized(held: Mapping[str, Any]) -> tuple[str, ...]:
    """Return a sentence where the activations of a cache are those of weights that were quantised to be loaded."""
    return (quantized_sentence(held["model"], "bitsandbytes"),) if held.get("quantize") else ()


def _storing(config: ReadingConfig) -> dict[str, Any]:
    return {"dtype": config.cache_dtype, "compression": config.cache_compression}


def _cache_name(config: ActivationsConfig, text: TextDataset | ImageFolder, rows: int, device: str) -> str:
    """Return a folder name that differs wherever the cached bytes would, also between bfloat16 and float32 models."""
    fingerprint = model_fingerprint(config.model, LoadOptions.of(config), of_chats=text.holds_chats)
    what = (fingerprint, text.fingerprint, config.hookpoint, str(dtype_of_model(config, device)))
    later: list[Any] = [config.held_out] if config.pack else []
    later += [] if config.cache_compression == "none" else [config.cache_compression]
    of_cache = (rows, config.cache_dtype, FORMAT_VERSION, *later)
    return f"{run_name(config)}-{text_digest([repr(sorted(config.of_tokens().items())), repr((what, of_cache))])[:8]}"


def run_name(config: ReadingConfig, sites: int = 1) -> str:
    """Return a readable name for what is trained on, fit for a folder.

    Args:
        config: what to read.
        sites: of an SAE; 0 where it takes all that there are.
    """
    if isinstance(config, ActivationsConfig) and config.activations is not None and is_complete_cache(config):
        held = ActivationCache.read_settings(config.activations)
        names = list(held["hookpoints"])
        model, hookpoint = held["model"], config.hookpoint or (names[0] if len(names) == 1 else "all")
    else:
        filled = config.filled(sites)
        model, hookpoint = filled.model, filled.hookpoint
    name = f"{Path(model).resolve().name}-{hookpoint}".replace("*", "all")
    return re.sub(r"[^\w.-]+", "-", name)[:120]
