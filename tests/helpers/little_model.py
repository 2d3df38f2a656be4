"""A small language model that was trained for a few seconds, and an SAE of it: enough to see what latents do."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch

import flashsae

HOOKPOINT = "h.1"
ANIMALS, VERBS, PLACES = ("cat", "dog", "hen", "cow", "pig"), ("sat", "ran", "hid", "lay"), ("mat", "hill", "barn")


def texts(number: int, seed: int = 0) -> list[str]:
    """Return documents of sentences, half of them in capitals."""
    rng = random.Random(seed)

    def document() -> str:
        sentences = [
            f"the {rng.choice(ANIMALS)} {rng.choice(VERBS)} on the {rng.choice(PLACES)}." for _ in range(4)
        ]  # fmt: skip
        text = " ".join(sentences)
        return text.upper() if rng.random() < 0.5 else text

    return [document() for _ in range(number)]


def byte_tokenizer() -> Any:
    """Return a tokenizer with a token for each byte, and one that begins a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: number for number, letter in enumerate(["<s>", *letters])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="<s>", pad_token="<s>")


def trained(steps: int = 90) -> Any:
    """Return a causal model of bytes, trained on `texts`."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = GPT2Config(
        vocab_size=257, n_positions=96, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0, **none
    )  # fmt: skip
    model, tokenizer = GPT2LMHeadModel(config), byte_tokenizer()
    rows = tokenizer(texts(300), padding="max_length", truncation=True, max_length=48, return_tensors="pt").input_ids
    adam = torch.optim.Adam(model.parameters(), lr=6e-3)
    for step in range(steps):
        batch = rows[torch.arange(step * 16, step * 16 + 16) % len(rows)]
        loss = model(batch, labels=batch).loss
        adam.zero_grad()
        loss.backward()
        adam.step()
    return model.eval()


def make(folder: Path) -> tuple[Path, Path]:
    """Make a model with its tokenizer, and an SAE of it, each in a folder; return these."""
    model, tokenizer = trained(), byte_tokenizer()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    acts = flashsae.activations(model, tokenizer, texts(60, seed=1), hookpoint=HOOKPOINT, context_length=64)
    sae = flashsae.fit(acts, d_sae=128, k=8, tokens=12_000, batch_tokens=256, shuffle_tokens=4096, progress=False)
    sae.save(folder / "sae", metadata={"model": "model", "hookpoint": HOOKPOINT})
    return folder / "model", folder / "sae"
