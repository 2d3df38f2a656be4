"""From settings to a source of activations: a cache that exists, a cache to be written now, or a model that streams."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from flashsae.data.cache import VERIFIED_BYTES, ActivationCache
from flashsae.data.cache_index import FORMAT_VERSION
from flashsae.data.cache_writer import SHARD_ROWS, cache_settings, write_cache
from flashsae.data.existing import (
    check_asked,
    check_begun,
    held_hookpoints,
    is_cache,
    is_complete_cache,
    moved_place,
    open_configured_text,
    rounding_warning,
)
from flashsae.data.fingerprint import text_digest
from flashsae.data.language_model import LanguageModelConfig, LanguageModelSource
from flashsae.data.sources import Chunk, Source, Split
from flashsae.data.text import TextDataset, check_splits
from flashsae.data.weights import model_fingerprint
from flashsae.errors import ConfigError
from flashsae.settings.reading import ActivationsConfig, ReadingConfig

LARGEST_DEFAULT_CACHE = 8 * 10**9
MODEL_BATCH_TOKENS = 8192


@dataclass(frozen=True)
class Opened:
    """Activations that are ready to be read.

    Args:
        sources: by hookpoint.
        tokenizer: that of the model; called, because loading it takes a moment.
        warnings: sentences on what may spoil the result.
    """

    sources: dict[str, Source]
    tokenizer: Callable[[], Any]
    warnings: tuple[str, ...] = ()

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
        CheckpointError: the cache is damaged, or is not complete and was begun with other settings.
    """
    if is_checked and config.activations is not None:
        config = replace(config, activations=moved_place(config.activations, folder))
    if config.activations is not None and is_complete_cache(config):
        return _prepare_cache(config if is_checked else check_asked(config, config.activations), config.activations)
    config = config.filled()
    text = open_configured_text(config)
    check_splits(text, config.held_out)
    rows = int(tokens / (1 - config.held_out))
    reading = _language_model_config(config, device)
    place = config.activations
    if place is None and not config.stream:
        place = folder / _cache_name(config, reading, text, rows)
    if place is not None and ActivationCache.is_complete(place):
        return _prepare_cache(config, place)
    if config.activations is not None:
        check_begun(config.activations, {"model": reading.model, "text_fingerprint": text.fingerprint})
    source = LanguageModelSource(reading, text, held_out=config.held_out)
    if config.activations is not None:
        wanted = cache_settings(source, SHARD_ROWS, rows, config.cache_dtype or "bf16")
        check_begun(config.activations, wanted)
    size = (4 if config.cache_dtype == "float32" else 2) * rows * sum(source.widths.values())
    is_too_large = config.stream is None and config.activations is None and size > LARGEST_DEFAULT_CACHE
    if place is None or is_too_large:
        if len(source.hookpoints) > 1:
            most = f"{LARGEST_DEFAULT_CACHE / 1e9:g}"
            why = (
                f"The cache would be {size / 1e9:.0f} GB, above {most} GB, so nothing is cached by default: give"
                if is_too_large
                else f"For several SAEs at once give, instead of --stream and for about {size / 1e9:.2g} GB,"
            )
            raise ConfigError(
                f"hookpoint: expected one module where nothing is cached, got {', '.join(source.hookpoints)}. {why} "
                "--activations FOLDER."
            )
        opened = Opened({source.hookpoints[0]: source}, lambda: source.tokenizer)
        how = f"{text.name}, streamed beside the training"
        row_bytes = source.d_in * source.dtype.itemsize
        return Prepared(
            source.widths,
            config,
            how,
            lambda _: opened,
            row_bytes=row_bytes,
            model_bytes=source.model_bytes,
            opened=opened,
        )

    def write_and_open(on_progress: Progress) -> Opened:
        write_cache(place, source, max_tokens=rows, dtype=config.cache_dtype or "bf16", on_progress=on_progress)
        return _prepare_cache(config, place).open(on_progress)

    config = replace(config, activations=place.resolve())
    how = f"{text.name}, to be cached in {place}: {rows:,} tokens at most"
    return Prepared(source.widths, config, how, write_and_open, cache_bytes=size)


def cache_activations(
    config: ReadingConfig, place: Path, *, max_tokens: int | None, device: str, on_progress: Progress | None = None
) -> tuple[str, ...]:
    """Write a cache, or go on with one: see `write_cache`. Arguments as for `prepare_activations`.

    Returns:
        sentences on what may spoil results.
    """
    config = config.filled()
    if place.exists():
        is_cache(place)
    text = open_configured_text(config)
    check_splits(text, None)
    source = LanguageModelSource(_language_model_config(config, device), text, held_out=0.0)
    write_cache(place, source, max_tokens=max_tokens, dtype=config.cache_dtype or "bf16", on_progress=on_progress)
    return tuple(filter(None, (rounding_warning(ActivationCache(place, name)) for name in source.hookpoints)))


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
        skip_first=config.skip_first or 0,
        exclude_ids=config.exclude_ids or (),
        prepend_bos=config.prepend_bos,
        shuffle_documents=config.shuffle_documents is not False,
        document_seed=config.document_seed or 0,
        device=device,
    )


def _cache_name(config: ReadingConfig, reading: LanguageModelConfig, text: TextDataset, rows: int) -> str:
    """Return a folder name that differs wherever the cached bytes would, also between bfloat16 and float32 models."""
    settings = {name: value for name, value in asdict(reading).items() if name not in ("model", "device")}
    settings["dtype"] = str(reading.resolved_dtype())
    what = (model_fingerprint(reading.model), text.fingerprint, rows, config.cache_dtype, FORMAT_VERSION)
    return f"{run_name(config)}-{text_digest([repr(sorted(settings.items())), repr(what)])[:8]}"


def run_name(config: ReadingConfig) -> str:
    """Return a readable name for what is trained on, fit for a folder."""
    if isinstance(config, ActivationsConfig) and config.activations is not None and is_complete_cache(config):
        held = ActivationCache.read_settings(config.activations)
        names = list(held["hookpoints"])
        model, hookpoint = held["model"], config.hookpoint or (names[0] if len(names) == 1 else "all")
    else:
        filled = config.filled()
        model, hookpoint = filled.model, filled.hookpoint
    name = f"{Path(model or '').resolve().name}-{hookpoint}".replace("*", "all")
    return re.sub(r"[^\w.-]+", "-", name)[:120]


def _prepare_cache(config: ActivationsConfig, place: Path) -> Prepared:
    names = held_hookpoints(config.hookpoint, list(ActivationCache.read_settings(place)["hookpoints"]))
    caches = {name: ActivationCache(place, name, config.held_out) for name in names}
    first = next(iter(caches.values()))
    warnings = tuple(filter(None, map(rounding_warning, caches.values())))
    opened = Opened(dict(caches), first.read_tokenizer, warnings)
    widths = {name: cache.d_in for name, cache in caches.items()}
    size = first.dtype.itemsize * first.n_rows * sum(widths.values())
    how = f"{first.dataset}: {first.n_rows:,} tokens, cached in {place} as {str(first.dtype).removeprefix('torch.')}"
    lost = max(cache.rounded_away for cache in caches.values())
    if first.dtype == torch.bfloat16 and lost:
        how += f", which rounds away {lost:.1g} of the variance"
    if size > len(caches) * VERIFIED_BYTES:
        how += "; too large to be verified at each run: flashsae cache --verify"
    config = replace(config, activations=place.resolve())
    return Prepared(widths, config, how, lambda _: opened, cache_bytes=size, opened=opened)
