"""From settings to a source of activations: a cache that exists, a cache to be written now, or a model that streams."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from flashsae.data.cache import INDEX_FILE, ActivationCache
from flashsae.data.cache_writer import write_cache
from flashsae.data.language_model import LanguageModelConfig, LanguageModelSource
from flashsae.data.models import match_hookpoints
from flashsae.data.sources import Chunk, Source, Split
from flashsae.data.text import TextDataset, check_splits, open_text
from flashsae.errors import CheckpointError, ConfigError, DataError
from flashsae.settings.reading import ActivationsConfig, ReadingConfig

LARGEST_DEFAULT_CACHE = 8 * 10**9
MODEL_BATCH_TOKENS = 8192
_OF_TEXT = ("text_column", "text_split", "text_subset")


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
    if config.activations is not None and is_complete_cache(config):
        return _prepare_cache(config if is_checked else _check_asked(config, config.activations), config.activations)
    config = config.filled()
    text = _open_text(config)
    check_splits(text, config.held_out)
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
            source.widths,
            config,
            how,
            lambda _: opened,
            row_bytes=row_bytes,
            model_bytes=source.model_bytes,
            opened=opened,
        )

    def write_and_open(on_progress: Progress) -> Opened:
        write_cache(place, source, max_tokens=rows, on_progress=on_progress)
        return _prepare_cache(config, place).open(on_progress)

    config = replace(config, activations=place.resolve())
    how = f"{text.name}, to be cached in {place}: {rows:,} tokens at most"
    return Prepared(source.widths, config, how, write_and_open, cache_bytes=size)


def is_complete_cache(config: ActivationsConfig) -> bool:
    """Tell whether the cache that settings name is there, or may be written there.

    Raises:
        ConfigError: it is not, and nothing says that it should be written.
        CheckpointError: what is there is no cache, or a damaged one.
    """
    place = config.activations
    if place is None:
        return False
    if place.exists():
        return _is_cache(place) and ActivationCache.is_complete(place)
    if config.model is None and config.dataset is None:
        raise ConfigError(
            f"activations: there is no cache at {place}. Check the path; to write a cache there, name the model and "
            f"the text too: flashsae train MODEL TEXT --hookpoint PATH --activations {place}."
        )
    return False


def _is_cache(place: Path) -> bool:
    """Tell a folder with a cache from an empty one; raise CheckpointError where something else is."""
    if not place.is_dir():
        raise CheckpointError(f"{place} is a file, and a cache of activations is a folder. Give another name.")
    if (place / INDEX_FILE).exists():
        return True
    if any(not path.name.startswith(".") for path in place.iterdir()):
        raise CheckpointError(
            f"{place} holds other files and no {INDEX_FILE}: it is no activation cache. Choose a new folder."
        )
    return False


def cache_activations(
    config: ReadingConfig, place: Path, *, max_tokens: int | None, device: str, on_progress: Progress | None = None
) -> None:
    """Write a cache, or go on with one: see `write_cache`. Arguments as for `prepare_activations`."""
    config = config.filled()
    if place.exists():
        _is_cache(place)
    text = _open_text(config)
    check_splits(text, None)
    source = LanguageModelSource(_language_model_config(config, device), text, held_out=0.0)
    write_cache(place, source, max_tokens=max_tokens, on_progress=on_progress)


def _open_text(config: ReadingConfig) -> TextDataset:
    assert config.dataset is not None
    given = {"split": config.text_split, "column": config.text_column, "subset": config.text_subset}
    return open_text(config.dataset, **{name: value for name, value in given.items() if value is not None})


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
    settings = {name: value for name, value in asdict(reading).items() if name not in ("dtype", "device")}
    how_read = (sorted(settings.items()), str(reading.resolved_dtype()))
    digest = hashlib.sha256(repr((*how_read, text.name, rows)).encode()).hexdigest()[:8]
    return f"{run_name(config)}-{digest}"


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
    names = _held_hookpoints(config.hookpoint, list(ActivationCache.read_settings(place)["hookpoints"]))
    caches = {name: ActivationCache(place, name, config.held_out) for name in names}
    first = next(iter(caches.values()))
    opened = Opened(dict(caches), first.read_tokenizer)
    widths = {name: cache.d_in for name, cache in caches.items()}
    size = 2 * first.n_rows * sum(widths.values())
    how = f"{first.dataset}: {first.n_rows:,} tokens, cached in {place}"
    config = replace(config, activations=place.resolve())
    return Prepared(widths, config, how, lambda _: opened, cache_bytes=size, opened=opened)


def _held_hookpoints(pattern: str | None, held: list[str]) -> list[str]:
    """Return which of the hookpoints of a cache a pattern stands for; all, where there is none."""
    if pattern is None:
        return held
    without_prefix = pattern.partition(".")[2]  # the name of the base model in its parent, such as transformer.
    return match_hookpoints(pattern, held) or match_hookpoints(without_prefix, held) or [pattern]


def _check_asked(config: ActivationsConfig, place: Path) -> ActivationsConfig:
    """Return the settings with those of a cache filled in.

    Raises:
        ConfigError: settings of a text stand there without a text, which the cache makes meaningless.
        DataError: the cache was written with others.
    """
    held = ActivationCache.read_settings(place)
    asked = {f.name: getattr(config, f.name) for f in fields(ReadingConfig) if f.name not in ("hookpoint", *_OF_TEXT)}
    of_text = [name for name in _OF_TEXT if getattr(config, name) is not None]
    if config.dataset is not None:
        asked["dataset"] = _open_text(config).name
    elif of_text:
        raise ConfigError(
            f"{of_text[0]}: expected nothing beside --activations {place}, a cache whose text has been read. Leave it "
            "out."
        )
    differences = [
        f"{name} is {held.get(name)!r} there, {value!r} was asked for"
        for name, value in asked.items()
        if value is not None and held.get(name) != (list(value) if isinstance(value, tuple) else value)
    ]
    if differences:
        raise DataError(
            f"the cache {place} holds other activations: {'; '.join(differences)}. Leave these settings out, or name "
            "another folder."
        )
    return replace(config, model=held["model"], context_length=held["context_length"])
