"""The special tokens around text in the inputs of a model: those of its tokenizer, and what settings make of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flashsae.errors import ConfigError
from flashsae.settings.reading import ReadingConfig

PROBE = "A short sentence to look at."


@dataclass(frozen=True)
class Framing:
    """Token ids around text, each a tuple that may be empty.

    Args:
        first: before what begins with a document.
        later: before what goes on with a document from the input before.
        suffix: at the end of every input.
        closing: behind a document that another one follows in the same input.
        opening: before a document that follows another one in the same input.
    """

    first: tuple[int, ...]
    later: tuple[int, ...]
    suffix: tuple[int, ...]
    closing: tuple[int, ...]
    opening: tuple[int, ...]

    def content(self, length: int) -> int:
        """Return how many tokens of text an input of `length` tokens holds that begins with a document."""
        return length - len(self.first) - len(self.suffix)


def framing_of(tokenizer: Any, config: ReadingConfig) -> Framing:
    """Find what stands around text.

    Args:
        tokenizer: of the model, from transformers.
        config: filled.
    Raises:
        ConfigError: there is no BOS token where settings want one, or the tokenizer is none that text can be cut for.
    """
    prefix, suffix = _added(tokenizer)
    bos = tokenizer.bos_token_id
    if config.prepend_bos and bos is None:
        raise ConfigError("prepend_bos: the tokenizer of this model has no BOS token; leave the setting out.")
    without = tuple(token for token in prefix if token != bos)
    if config.prepend_bos and bos not in prefix:
        prefix = (bos, *prefix)
    elif config.prepend_bos is False:
        prefix = without
    of_documents = config.bos_every == "document"
    if of_documents and (bos is None or bos not in prefix):
        raise ConfigError(
            "bos_every: the tokenizer of this model begins no input with a BOS token"
            + ("; leave the setting out." if bos is None else "; add --prepend-bos, or leave the setting out.")
        )
    if of_documents:
        return Framing(prefix, without, suffix, suffix, prefix)
    ends = [token for token in (tokenizer.eos_token_id, bos) if token is not None]
    return Framing(prefix, prefix, suffix, suffix or tuple(ends[:1]), ())


def encode(tokenizer: Any, texts: list[str], *, special: bool = False) -> list[list[int]]:
    """Return the token ids of texts, with what the tokenizer adds to each if `special`."""

    def called(these: list[str]) -> list[list[int]]:
        ids: list[list[int]] = tokenizer(these, add_special_tokens=special, verbose=False)["input_ids"]
        return ids

    # masks and types, which nobody asked for, take transformers four times as long as the ids take its backend
    backend = getattr(getattr(tokenizer, "backend_tokenizer", None), "encode_batch_fast", None)
    if backend is None or len(texts) < 2:
        return called(texts)
    first = called(texts[:1])  # which also lets the backend cut and pad nothing
    ids = [encoding.ids for encoding in backend(texts, add_special_tokens=special)]
    return ids if ids[:1] == first else called(texts)  # some tokenizers do something of their own before


def _added(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Find what the tokenizer puts around a text; the ways to ask it differ between versions."""
    bare, full = encode(tokenizer, [PROBE])[0], encode(tokenizer, [PROBE], special=True)[0]
    if not bare:
        raise ConfigError("model: its tokenizer makes no token of English text; FlashSAE cannot read with it.")
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return tuple(full[:start]), tuple(full[start + len(bare) :])
    raise ConfigError("model: its tokenizer changes a text when it adds special tokens; FlashSAE cannot cut it.")
