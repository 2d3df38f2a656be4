"""Activations of a language model as it reads text: any hookpoints of any Hugging Face model.

One forward a batch, stopped behind the last hooked module. Documents are read alone, cut into windows, and the
windows of a block of documents are batched by length, in an order that depends on nothing but the settings.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import takewhile
from typing import Any, Literal

import torch
from torch import Tensor, nn

from flashsae.backend import resolve_device
from flashsae.data.fingerprint import text_digest
from flashsae.data.models import (
    HookedModel,
    load_language_model,
    loaded_fingerprint,
    model_fingerprint,
    resolve_hookpoints,
)
from flashsae.data.sources import Chunk, Cursor, Split, check_held_out, split_mask
from flashsae.data.text import TextDataset
from flashsae.data.windows import Block, TokenBatch, Windows
from flashsae.errors import ConfigError, DataError

_BLOCK_CHARACTERS_PER_TOKEN = 32
"""A block holds about eight forwards: enough windows for batches of like length, little to lose in a kill."""


@dataclass(frozen=True)
class LanguageModelConfig:
    """What to read from which model.

    Args:
        model: ``"minilm"`` (six layers of width 384, from the extra `demo`, no download), or a folder or a name on
            the hub for ``transformers.AutoModel``. Where a loaded model is passed, its name for messages.
        hookpoints: module paths in the base model, such as ``encoder.layer.2`` or ``h.3.mlp``; ``*`` stands for
            anything but a dot, so ``layers.*`` is every layer.
        context_length: tokens in one model input, special tokens included.
        batch_tokens: tokens in one forward, padding included.
        mask_special: leave out the tokens that the tokenizer adds, and its special tokens anywhere else.
        max_norm_ratio: leave out tokens whose norm exceeds so many times the median of their forward at any
            hookpoint (attention sinks); None keeps all.
        max_documents: an epoch ends before this document number, whatever the split; None reads all.
        dtype: of the model and its activations; "auto" is float32 on a CPU and bfloat16 on a GPU.
        device: "auto" is the GPU where there is one.
    Raises:
        ConfigError: a setting is out of range.
    """

    model: str
    hookpoints: tuple[str, ...]
    context_length: int = 256
    batch_tokens: int = 8192
    mask_special: bool = True
    max_norm_ratio: float | None = None
    max_documents: int | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    device: str = "auto"

    def __post_init__(self) -> None:
        if not isinstance(self.hookpoints, tuple) or not self.hookpoints:
            raise ConfigError(f"hookpoints: expected a tuple of at least one module path, got {self.hookpoints!r}.")
        if self.context_length < 1 or self.batch_tokens < self.context_length:
            raise ConfigError(
                f"batch_tokens: expected at least one input of context_length >= 1 tokens, "
                f"got batch_tokens {self.batch_tokens} and context_length {self.context_length}."
            )
        if self.max_norm_ratio is not None and not self.max_norm_ratio > 1.0:
            raise ConfigError(f"max_norm_ratio: expected more than 1 or None, got {self.max_norm_ratio}.")
        if self.max_documents is not None and self.max_documents < 1:
            raise ConfigError(f"max_documents: expected at least 1 or None, got {self.max_documents}.")
        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise ConfigError(f"dtype: expected 'auto', 'float32' or 'bfloat16', got {self.dtype!r}.")

    def resolved_dtype(self) -> torch.dtype:
        """Return the dtype of the model and of its activations."""
        if self.dtype != "auto":
            return torch.float32 if self.dtype == "float32" else torch.bfloat16
        return torch.float32 if resolve_device(self.device).type == "cpu" else torch.bfloat16


class LanguageModelSource:
    """A `StreamSource` of the activations of a language model at one or several hookpoints.

    Args:
        config: what to read from which model.
        text: the documents.
        held_out: fraction of the documents that training never sees.
        loaded: a model (with or without a head) and its tokenizer to use instead of loading `config.model`. The
            model is switched to evaluation and its parameters are frozen; it keeps its dtype and device.
    Raises:
        ConfigError: no such model or hookpoint, or a context that the model cannot read.
        MissingExtraError: transformers is not installed.
    """

    def __init__(
        self,
        config: LanguageModelConfig,
        text: TextDataset,
        *,
        held_out: float = 0.05,
        loaded: tuple[nn.Module, Any] | None = None,
    ) -> None:
        self.config = config
        self.text = text
        self._held_out = check_held_out(held_out)
        model, self.tokenizer = loaded or load_language_model(config.model, config.resolved_dtype())
        model = getattr(model, "base_model", model)
        if loaded is None:
            model = model.to(resolve_device(config.device))
        self.hookpoints = resolve_hookpoints(model, config.hookpoints)
        self.name = f"{config.model} at {', '.join(self.hookpoints)} reading {text.name}"
        self._check_context(model)
        self._windows = Windows(
            self.tokenizer,
            context_length=config.context_length,
            batch_tokens=config.batch_tokens,
            mask_special=config.mask_special,
        )
        self._is_given = loaded is not None
        self._model = HookedModel(model, self.hookpoints)
        self.widths, self.dtype = self._probe()

    def _check_context(self, model: nn.Module) -> None:
        settings = getattr(model, "config", None)
        limits = (getattr(settings, "max_position_embeddings", None), self.tokenizer.model_max_length)
        limit = min(limit for limit in limits if limit)
        if self.config.context_length > limit:
            raise ConfigError(
                f"context_length: {self.config.model} reads at most {limit} tokens, got {self.config.context_length}."
            )

    def _probe(self) -> tuple[dict[str, int], torch.dtype]:
        """Read a few words to learn the width at every hookpoint, which no two models call the same."""
        batch = self._windows.probe()
        outputs = self._model(batch.ids, batch.attention)
        for name, output in outputs.items():
            if output.dim() != 3 or output.shape[:2] != batch.ids.shape:
                raise ConfigError(
                    f"hookpoints: expected an output of shape [sequences, length, d], got {list(output.shape)} from "
                    f"{name} for {list(batch.ids.shape)} tokens; choose a module of the residual stream, an MLP or an "
                    "attention output."
                )
        return {name: int(out.shape[2]) for name, out in outputs.items()}, next(iter(outputs.values())).dtype

    @property
    def d_in(self) -> int:
        """Width of the activations; ConfigError where there are several hookpoints (see `widths`)."""
        return self.widths[self._only_hookpoint()]

    @property
    def model_bytes(self) -> int:
        """Memory that the parameters of the model take."""
        return sum(p.numel() * p.element_size() for p in self._model.model.parameters())

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What decides the activations, by name, as JSON: fingerprints of text and model, and the settings.

        Free of paths, so that what was moved is still the same. Model, tokenizer and text are read for it once.
        """
        settings = {name: value for name, value in asdict(self.config).items() if name not in ("model", "device")}
        model, tokenizer = self._model.model, self.tokenizer
        return {
            "text": self.text.fingerprint,
            "model": loaded_fingerprint(model, tokenizer) if self._is_given else model_fingerprint(self.config.model),
            **settings,
            "hookpoints": list(self.hookpoints),
            "dtype": str(self.dtype).removeprefix("torch."),
            "held_out": self._held_out,
        }

    @cached_property
    def fingerprint(self) -> str:
        """Digits that stand for the weights, the tokenizer and the settings of reading, not for text and split."""
        return text_digest([repr(sorted((k, v) for k, v in self.identity.items() if k not in ("text", "held_out")))])

    def _only_hookpoint(self) -> str:
        if len(self.hookpoints) != 1:
            raise ConfigError(
                f"hookpoints: expected exactly one here, got {', '.join(self.hookpoints)}; choose one, or read all of "
                "them with chunks_by_hookpoint or into a cache."
            )
        return self.hookpoints[0]

    def chunks(self, split: Split, cursor: Cursor | None = None) -> Iterator[tuple[Chunk, Cursor]]:
        """Yield one epoch of a split at the only hookpoint, as `chunks_by_hookpoint`."""
        name = self._only_hookpoint()
        return ((chunk[name], behind) for chunk, behind in self.chunks_by_hookpoint(split, cursor))

    def chunks_by_hookpoint(
        self, split: Split | None, cursor: Cursor | None = None
    ) -> Iterator[tuple[dict[str, Chunk], Cursor]]:
        """Yield one epoch, a forward at a time: a chunk for each hookpoint, of the same tokens.

        Args:
            split: "train", "held_out", or None for all documents. The others do not reach the model.
            cursor: start there; None is the beginning. Its "dropped" counts the tokens that the norm filter left
                out up to there.
        Raises:
            DataError: activations are NaN or Inf; names the hookpoint and the documents.
        """
        place = cursor or {"document": 0, "batch": 0, "dropped": 0}
        done, dropped = place["batch"], place["dropped"]
        for block, batches in self._batched_blocks(split, place["document"]):
            for number in range(done, len(batches)):
                chunks, n_dropped = self._read(batches[number])
                dropped += n_dropped
                block_ends = number + 1 == len(batches)
                document, n_done = (block[-1][0] + 1, 0) if block_ends else (block[0][0], number + 1)
                yield chunks, {"document": document, "batch": n_done, "dropped": dropped}
            done = 0

    def _batched_blocks(self, split: Split | None, start: int) -> Iterator[tuple[Block, list[TokenBatch]]]:
        """Yield blocks with their batches; a thread cuts the next block while the model reads this one."""
        blocks = self._blocks(split, start)

        def cut() -> tuple[Block, list[TokenBatch]]:
            block = next(blocks, [])
            return block, self._windows.batches(block)

        with ThreadPoolExecutor(1, "flashsae-tokenizer") as pool:
            ahead = pool.submit(cut)
            while True:
                block, batches = ahead.result()
                if not block:
                    return
                ahead = pool.submit(cut)
                yield block, batches

    def _blocks(self, split: Split | None, start: int) -> Iterator[Block]:
        """Yield the (number, document)s of a split from `start` on, a block at a time."""
        limit = self.config.max_documents
        block: Block = []
        room = characters = _BLOCK_CHARACTERS_PER_TOKEN * self.config.batch_tokens
        for number, document in takewhile(lambda row: limit is None or row[0] < limit, self.text.numbered(start)):
            if split is None or self._is_in(split, number):
                block.append((number, document))
                room -= len(document)
            if room <= 0:
                yield block
                block, room = [], characters
        if block:
            yield block

    def _is_in(self, split: Split, document: int) -> bool:
        return bool(split_mask(torch.tensor([document]), self._held_out, split)[0])

    def _read(self, batch: TokenBatch) -> tuple[dict[str, Chunk], int]:
        """Run the model on a batch; return its chunks and how many tokens the norm filter dropped."""
        outputs = self._model(batch.ids, batch.attention)
        keep = batch.keep.to(self._model.device)
        acts = {name: output[keep] for name, output in outputs.items()}
        documents = batch.documents[batch.keep]
        for name, rows in acts.items():
            self._check_finite(name, rows, documents)
        tokens = batch.ids[batch.keep].to(torch.int32)
        position = torch.arange(batch.ids.shape[1], dtype=torch.int32).expand_as(batch.ids)[batch.keep]
        chunks = {name: Chunk(rows, documents, tokens, position) for name, rows in acts.items()}
        ratio = self.config.max_norm_ratio
        if ratio is None or not len(tokens):
            return chunks, 0
        norms = [rows.float().norm(dim=1) for rows in acts.values()]
        small = torch.stack([norm <= ratio * norm.median() for norm in norms]).all(dim=0).cpu()
        return {name: chunk.select(small) for name, chunk in chunks.items()}, int((~small).sum())

    def _check_finite(self, name: str, acts: Tensor, documents: Tensor) -> None:
        if bool(acts.isfinite().all()):
            return
        bad = sorted(set(documents[~acts.isfinite().all(dim=1).cpu()].tolist()))
        raise DataError(
            f"{self.config.model} gives NaN or Inf at {name} for the documents {bad[:10]} of {self.text.name} "
            f"({len(bad)} in all). Try dtype float32, or take those documents out."
        )
