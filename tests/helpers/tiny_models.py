"""Tiny random models, a tokenizer of words, and sources made of them: the fixture `tiny` is this module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from flashsae.data.language_model import LanguageModelSource
from flashsae.data.sources import Chunk, Cursor
from flashsae.data.split import Split
from flashsae.settings.reading import ReadingConfig
from flashsae.text.dataset import TextDataset
from flashsae.text.open import open_text

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "then", "it", "went", "out", "to", "see", "what", "was", "there"]
DOCUMENTS = [" ".join(WORDS[(i * 5 + j * (i + 2)) % len(WORDS)] for j in range(2 + (i * 7) % 45)) for i in range(40)]
TEXT = open_text(DOCUMENTS)


def word_tokenizer(*, bos: bool = False) -> Any:
    """One token a word, no padding token; with a beginning token if asked."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<s>", "<unk>", *dict.fromkeys(WORDS)])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>" if bos else None)


CHAT_TEMPLATE = (
    "{% for message in messages %}<turn>{{ message['role'] }} "
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %} {% endfor %}"
)


def chat_tokenizer(template: Any = CHAT_TEMPLATE) -> Any:
    """The same with a beginning token, a template for chats, and the words that this needs."""
    from tokenizers import AddedToken

    tokenizer = word_tokenizer(bos=True)
    tokenizer.add_tokens([AddedToken("<turn>", special=True), "assistant"])
    tokenizer.chat_template = template
    return tokenizer


def gpt2(layers: int = 3) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=layers, n_head=2)
    return GPT2LMHeadModel(config)


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaModel(LlamaConfig(vocab_size=64, max_position_embeddings=32, **sizes))


def bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BertModel(BertConfig(vocab_size=64, max_position_embeddings=32, **sizes))


_SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
_HALVES = {
    f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 2), ("attention_heads", 2))
}
_BART = {"vocab_size": 64, "d_model": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, **_HALVES}
_IMAGES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
_IMAGES |= {"image_size": 8, "patch_size": 4}
_T5 = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}


def _make(family: str, **settings: Any) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    model: nn.Module = getattr(transformers, f"{family}Model")(getattr(transformers, f"{family}Config")(**settings))
    return model


MORE_FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "gpt2": gpt2,
    "llama": llama,
    "gpt_neox": lambda: _make("GPTNeoX", vocab_size=64, max_position_embeddings=32, **_SIZES),
    "opt": lambda: _make(
        "OPT", vocab_size=64, hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=32, word_embed_proj_dim=16,
    ),
    "bloom": lambda: _make("Bloom", vocab_size=64, hidden_size=16, n_layer=2, n_head=2),
    "roberta": lambda: _make("Roberta", vocab_size=64, max_position_embeddings=34, pad_token_id=1, **_SIZES),
    "t5": lambda: _make("T5", decoder_start_token_id=0, **_T5),
    "bart": lambda: _make("Bart", max_position_embeddings=32, **_BART),
    "whisper": lambda: _make(
        "Whisper", pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, **_BART
    ),
    "clip": lambda: _make(
        "CLIP", vision_config=_IMAGES,
        text_config={"vocab_size": 64, "max_position_embeddings": 32, "bos_token_id": 0, "eos_token_id": 1, **_SIZES},
    ),
    "vit": lambda: _make("ViT", **_IMAGES),
}  # fmt: skip
"""Families that differ in what reads text, how long it may be and what modules give."""
FAMILIES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "gpt2": (gpt2, "h.*"),
    "llama": (llama, "layers.*"),
    "bert": (bert, "encoder.layer.*"),
}
_SHORT = ReadingConfig("tiny", context_length=16, shuffle_documents=False, model_dtype="float32")
SMALL = replace(_SHORT, hookpoint="h.1", forward_tokens=64)
CACHED = replace(_SHORT, hookpoint="h.[01]", forward_tokens=32)
SHARD_ROWS = 100


def source(
    config: ReadingConfig = SMALL,
    text: TextDataset = TEXT,
    *,
    model: nn.Module | None = None,
    hookpoints: Sequence[str] = (),
    bos: bool = False,
    held_out: float = 0.2,
) -> LanguageModelSource:
    loaded = (gpt2() if model is None else model, word_tokenizer(bos=bos))
    return LanguageModelSource(config, text, hookpoints=hookpoints, held_out=held_out, loaded=loaded)


def collect(
    reader: LanguageModelSource, split: Split | None, cursor: Cursor | None = None
) -> tuple[Chunk, list[Cursor]]:
    """Concatenate an epoch."""
    chunks, cursors = zip(*reader.chunks(split, cursor))
    return concatenate(list(chunks)), list(cursors)


def concatenate(chunks: list[Chunk]) -> Chunk:
    return Chunk(
        {site: torch.cat([chunk.acts[site] for chunk in chunks]) for site in chunks[0].acts},
        torch.cat([chunk.group for chunk in chunks]),
        torch.cat([need(chunk.token_ids) for chunk in chunks]),
        torch.cat([need(chunk.position) for chunk in chunks]),
    )


def need(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


def same(a: Chunk, b: Chunk) -> bool:
    known = ("group", "token_ids", "position")
    return (
        list(a.acts) == list(b.acts)
        and all(torch.equal(acts, b.acts[site]) for site, acts in a.acts.items())
        and all(torch.equal(getattr(a, name), getattr(b, name)) for name in known)
    )
