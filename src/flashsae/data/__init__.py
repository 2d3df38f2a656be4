"""Activations: sources, text, language models, the cache on disk, shuffling, synthetic ones with known directions."""

from flashsae.data.cache import ActivationCache
from flashsae.data.cache_writer import write_cache
from flashsae.data.inputs import InputSource
from flashsae.data.language_model import LanguageModelSource
from flashsae.data.sources import ArraySource, Chunk, IterableSource
from flashsae.data.synthetic import SuperpositionModel
from flashsae.settings.reading import ReadingConfig
from flashsae.text.open import open_text

__all__ = [
    "ActivationCache",
    "ArraySource",
    "Chunk",
    "InputSource",
    "IterableSource",
    "LanguageModelSource",
    "ReadingConfig",
    "SuperpositionModel",
    "open_text",
    "write_cache",
]
