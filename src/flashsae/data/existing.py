"""A cache that may be there already: where it lies, whether it is what settings ask for, and what to warn of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from flashsae.data.cache import VERIFIED_BYTES, ActivationCache
from flashsae.data.cache_index import INDEX_FILE, CacheIndex
from flashsae.data.cache_writer import DTYPE_NAMES, changes, extends
from flashsae.data.image_files import ImageFolder, find_images
from flashsae.data.row_shuffle import WINDOW_ROWS
from flashsae.errors import CheckpointError, ConfigError, DataError, MissingExtraError
from flashsae.lm.hookpoints import (
    IMAGE_PATHS,
    OUTPUT,
    TEXT_PATHS,
    alternatives,
    in_names_of_now,
    match_hookpoints,
    without_wrappers,
)
from flashsae.lm.loading import reads_images
from flashsae.lm.options import LoadOptions
from flashsae.lm.weights import model_fingerprint
from flashsae.natural import in_order
from flashsae.settings.left_open import default_values, given
from flashsae.settings.reading import MINILM, OF_TEXT, PYTHON_DOCS, ActivationsConfig, ReadingConfig
from flashsae.text.dataset import TextDataset
from flashsae.text.open import open_text

MOST_ROUNDED = 1e-3
"""Fraction of the variance that a cache may round away without a warning: a hundredth of a usual FVU."""
BASE_MODEL_PREFIXES = frozenset(
    """
    albert bert biogpt codegen data2vec_text deberta distilbert electra ernie esm gpt_neox gte language_model led
    longformer luke mobilebert model mpnet mra nomic_bert nystromformer reformer rembert roberta roberta_prelayernorm
    roc_bert roformer rwkv splinter switch_transformers text_model transformer transformers xlm_roberta_xl
    """.split()  # noqa: SIM905 - reads as the names that it lists
)
"""What models that read text are called in their parents, by the `base_model_prefix` of transformers; a cache does not
say it of its own model."""


def is_complete_cache(config: ActivationsConfig) -> bool:
    """Tell whether the cache that settings name is there, or may be written there.

    Raises:
        ConfigError: it is not, and nothing says that it should be written.
        CheckpointError: what is there is no cache, a damaged one, or one that is not complete and of which nothing
            says how to go on.
    """
    place = config.activations
    if place is None:
        return False
    is_there = place.exists() and is_cache(place)
    if is_there and ActivationCache.is_complete(place):
        return True
    if not {"model", "dataset"} & given(config).keys():
        if is_there:
            raise not_complete(place, CacheIndex.read(place))
        raise ConfigError(
            f"activations: there is no cache at {place}. Check the path; to write a cache there, name the model and "
            f"the text too: flashsae train MODEL TEXT --hookpoint PATH --activations {place}."
        )
    return False


def check_unfinished(place: Path, wanted: dict[str, Any]) -> None:
    """Raise CheckpointError where a cache that is not complete has other settings than these."""
    if not place.exists() or not is_cache(place):
        return
    index = CacheIndex.read(place)
    differences = changes({name: index.settings[name] for name in wanted if name in index.settings}, wanted)
    is_longer = "max_tokens" in wanted and extends(index, wanted)
    if differences and index.shards and not is_longer:  # without shards it is written anew
        raise not_complete(place, index, f": {'; '.join(differences)}")


def not_complete(place: Path, index: CacheIndex, differences: str = "") -> CheckpointError:
    """Return the error on a cache that is not complete, and has these differences to what is asked for."""
    return CheckpointError(
        f"the cache {place} is not complete ({index.rows:,} rows so far): finish it with flashsae cache MODEL TEXT "
        f"--hookpoint PATH --out {place}, or give the settings that it was begun with{differences}."
    )


def is_cache(place: Path) -> bool:
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


def check_asked(config: ActivationsConfig, place: Path) -> ActivationsConfig:
    """Return the settings with those of a cache filled in.

    Raises:
        ConfigError: settings of a text stand there without a text, which the cache makes meaningless.
        DataError: the cache was written with others.
    """
    held = ActivationCache.read_settings(place)
    asked, told = config.of_tokens(whole=True), given(config)
    if "cache_dtype" in told:
        asked["dtype"] = DTYPE_NAMES[config.cache_dtype]
    if "cache_compression" in told:
        asked["cache_compression"] = config.cache_compression
    if told.get("model_dtype", "auto") != "auto":
        asked["model_dtype"] = config.model_dtype
    if "dataset" in told:
        text = open_configured_text(config)
        asked |= {"dataset": text.name, "text_fingerprint": text.fingerprint}
    else:
        _check_no_text(config, place)
    if "model" in told:
        asked |= {"model": config.model, "model_fingerprint": _known_fingerprint(config, held["model_fingerprint"])}
    else:
        _check_no_loading(config, place)
    asked = {name: value for name, value in asked.items() if value is not None}
    differences = changes({name: held[name] for name in asked if name in held}, asked, ", {!r} was asked for")
    if differences:
        raise DataError(
            f"the cache {place} holds other activations than were asked for: {'; '.join(differences)}. Leave these "
            "settings out, or name another folder."
        )
    return replace(config, model=held["model"], context_length=held["context_length"])


def _check_no_text(config: ReadingConfig, place: Path) -> None:
    """Raise ConfigError where settings of a text are given without a text."""
    for name in OF_TEXT:
        if getattr(config, name) is not None:
            raise ConfigError(
                f"{name}: expected nothing beside --activations {place}, a cache whose text has been read. Leave it "
                "out."
            )


def _check_no_loading(config: ReadingConfig, place: Path) -> None:
    """Raise ConfigError where settings that load a model are given without a model."""
    for name in ("revision", "subfolder", "adapter", "device_map"):
        if getattr(config, name) is not None:
            raise ConfigError(
                f"{name}: expected nothing beside --activations {place}, a cache whose model has read already. Leave "
                "it out."
            )


def _known_fingerprint(config: ReadingConfig, held: str) -> str | None:
    """Return the fingerprint of a model; None where it is not to be had here, as when only its cache was brought.

    Args:
        config: names the model.
        held: the fingerprint in a cache, which may tell of the chat template too.
    """
    try:
        found = model_fingerprint(config.model, LoadOptions.of(config))
        if found == held:
            return found
        return held if model_fingerprint(config.model, LoadOptions.of(config), of_chats=True) == held else found
    except (ConfigError, MissingExtraError):
        return None


def held_hookpoints(pattern: str, held: Sequence[str]) -> list[str]:
    """Return which of the hookpoints that are there a pattern stands for; what is not among them, as it is named."""
    found: list[str] = []
    for choice in alternatives(pattern):
        inner = without_wrappers(choice)
        prefix, _, without_prefix = inner.partition(".")
        short = without_prefix if prefix in BASE_MODEL_PREFIXES else inner
        inside = (f"{part}.{short}" for part in (*TEXT_PATHS, *IMAGE_PATHS))
        ways = (choice, short, *inside, in_names_of_now(choice), in_names_of_now(short))
        matches = next(filter(None, (match_hookpoints(way, held) for way in ways)), [])
        found += matches or [choice.removesuffix(OUTPUT)]
    return in_order(dict.fromkeys(found))


def stored_in_words(caches: Sequence[ActivationCache]) -> str:
    """Say how the activations of a cache are stored, for several SAEs, and what that means for whoever reads them."""
    first = caches[0]
    told, lost = first.stored_as, max(cache.rounded_away for cache in caches)
    if first.settings["dtype"] != "float32" and lost:
        told += f", which rounds away {lost:.1g} of the variance"
    if first.is_compressed:
        held = min(first.n_rows, WINDOW_ROWS) * max(sum(cache.widths.values()) for cache in caches)
        told += f"; up to {held * first.dtype.itemsize / 1e9:.2f} GB of it are held decompressed in memory"
    if sum(cache.stored_bytes for cache in caches) > len(caches) * VERIFIED_BYTES:
        told += "; too large to be verified at each run: flashsae cache --verify"
    return told


def to_be_stored_in_words(config: ReadingConfig) -> str:
    """Say how activations will be stored, where that is not the default; what is rounded away is measured meanwhile."""
    told = {"float32": ", as float32", "int8": ", as int8, which rounds away some 4e-05 of their variance"}
    return told.get(config.cache_dtype, "") + (", compressed" if config.cache_compression == "zstd" else "")


def rounding_warning(cache: ActivationCache) -> str | None:
    """Return a sentence where a cache rounds away more of the activations than may go unnoticed, else None."""
    dtype = cache.settings["dtype"]
    if dtype == "float32" or cache.rounded_away <= MOST_ROUNDED:
        return None
    if dtype == "int8":
        return (
            f"of the activations at {', '.join(cache.hookpoints)} int8 rounds away {cache.rounded_away:.1%} of the "
            "variance, which neither training nor figures will see. Cache them anew with --cache-dtype bf16 or float32."
        )
    return (
        f"the activations at {', '.join(cache.hookpoints)} have a mean so much larger than their spread that bfloat16 "
        f"rounds away {cache.rounded_away:.1%} of their variance, which neither training nor figures will see. Cache "
        "them anew with --cache-dtype float32."
    )


_OF_TEXT_ALONE = (
    *("context_length", "exclude_ids", "prepend_bos", "bos_every", "pack", "pack_apart", "overlap"),
    *("assistant_only", "shuffle_whole", "side", *OF_TEXT),
)
"""Settings that mean nothing for images."""


def configured_images(config: ReadingConfig, *, are_meant: bool = False) -> ImageFolder | None:
    """Return the images that settings name; None where they name a text.

    Args:
        config: the settings.
        are_meant: images are read where there are any, whatever lies beside them.
    Raises:
        ConfigError: settings of text stand beside images.
    """
    images, others = find_images(config.dataset or PYTHON_DOCS)
    if images is None or (others and not are_meant and not _are_meant(config, images, others)):
        return None
    defaults = default_values(ReadingConfig())
    for name in _OF_TEXT_ALONE:
        value = getattr(config, name)
        if value not in (None, defaults.get(name)):
            raise ConfigError(f"{name}: expected nothing beside the images in {images.name}, got {value!r}.")
    return images


def _are_meant(config: ReadingConfig, images: ImageFolder, others: int) -> bool:
    """Tell whether of a folder with images and other files the images are to be read: by the model, or by the most."""
    alone, beside = reads_images(config.model or MINILM, LoadOptions.of(config))
    return alone or (beside and len(images.files) > others)


def open_configured_text(config: ReadingConfig) -> TextDataset | ImageFolder:
    """Open the text that settings name, or the images.

    Raises:
        ConfigError: settings of text stand beside images.
    """
    images = configured_images(config)
    if images is not None:
        return images
    asked = {name.removeprefix("text_"): getattr(config, name) for name in OF_TEXT}
    return open_text(config.dataset, **{name: value for name, value in asked.items() if value is not None})
