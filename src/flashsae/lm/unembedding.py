"""The matrix that makes logits of the residual stream of a language model."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from flashsae.errors import ConfigError
from flashsae.lm.adapters import base_and_adapter
from flashsae.lm.loading import load_with_account
from flashsae.lm.options import PLAIN, LoadOptions
from flashsae.lm.place import model_place, not_loaded, quiet_transformers, read_config


def load_unembedding(name: str, options: LoadOptions = PLAIN) -> tuple[Tensor, Any]:
    """Return the unembedding of a language model that predicts the next token, and its tokenizer.

    Args:
        name: as of `flashsae.lm.loading.load_language_model`.
        options: as there.
    Returns:
        [vocabulary, d_model], float32, on the CPU.
    Raises:
        ConfigError: as there; or the model predicts no tokens, or its weights of that are not in its files.
    """
    base, _, own = base_and_adapter(name, options)
    config = read_config(base, own)
    if not any(re.search("ForCausalLM|LMHead", each) for each in getattr(config, "architectures", None) or ()):
        raise ConfigError(f"logits: {name} is not saved as a model that predicts the next token. Leave --logits out.")
    _, tokenizer, _ = load_with_account(name, torch.float32, options)
    with quiet_transformers() as transformers:
        try:
            model, told = transformers.AutoModelForCausalLM.from_pretrained(
                model_place(base), **own.of_place, output_loading_info=True
            )
        except Exception as error:  # a boundary: missing file, no network, damaged weights
            raise not_loaded(name, error) from error
    head = model.get_output_embeddings()
    names = {
        key for key, each in model.named_parameters(remove_duplicate=False) if each is getattr(head, "weight", None)
    }
    if not names or names <= set(told["missing_keys"]):
        raise ConfigError(f"logits: the files of {name} hold no weights that predict tokens. Leave --logits out.")
    weight: Tensor = head.weight.detach().float()
    return weight, tokenizer
