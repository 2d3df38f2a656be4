"""Activations of a language model, few and real: of MiniLM's second layer on the documentation of Python."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from flashsae.data.acts import only_site
from flashsae.data.language_model import LanguageModelSource
from flashsae.settings.reading import ReadingConfig
from flashsae.text.open import open_text


@functools.cache
def language_acts(tokens: int = 12_000, layer: int = 1) -> tuple[Tensor, Tensor]:
    """Return tokens to train on, [n, 384], and a tenth as many others, each drawn from all documents alike."""
    config = ReadingConfig("minilm", hookpoint=f"encoder.layer.{layer}", context_length=128)
    source, parts, there = LanguageModelSource(config, open_text("python-docs"), device="cpu"), [], 0
    for chunk, _ in source.chunks("train"):
        parts.append(only_site(chunk.acts).float())
        there += len(parts[-1])
        if there >= tokens:
            break
    acts = torch.cat(parts)[:tokens]
    acts = acts[torch.randperm(len(acts), generator=torch.Generator().manual_seed(0))]
    return acts[len(acts) // 10 :], acts[: len(acts) // 10]
