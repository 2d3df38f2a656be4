"""Activations of a language model as it reads text: any hookpoints of any Hugging Face model.

One forward a batch, stopped behind the last hooked module. Documents are read alone, cut into windows, and the
windows of a block of documents are batched by length, in an order that depends on nothing but the settings.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from copy import copy
from dataclasses import asdict
from functools import cached_property
from typing import Any

import torch
from torch import nn

from flashsae.backend import cores, resolve_device
from flashsae.data.acts import only_site
from flashsae.data.forwards import Forwards, Launched
from flashsae.data.sources import Chunk, Cursor
from flashsae.data.split import HeldOut, Split
from flashsae.errors import ConfigError
from flashsae.files.fingerprint import text_digest
from flashsae.lm.apart import WindowsApart
from flashsae.lm.hooked import HookedModel
from flashsae.lm.hookpoints import patterns_in, resolve_hookpoints
from flashsae.lm.loading import Loading, load_with_account
from flashsae.lm.look import check_apart, look
from flashsae.lm.options import PLAIN, LoadOptions, quantized_warning
from flashsae.lm.parts import bare, context_limit, text_paths, vocabulary_size
from flashsae.lm.replay import ReplaysByStream
from flashsae.lm.room import moved
from flashsae.lm.weights import check_loaded, loaded_fingerprint, model_fingerprint
from flashsae.lm.windows import TokenBatch, Windows, first_tokens
from flashsae.settings.reading import ReadingConfig, check_held_out
from flashsae.text.content import Block, Content
from flashsae.text.dataset import TextDataset
from flashsae.text.reading_order import Place, ReadingOrder
from flashsae.text.whole import check_any_order, shuffled

_BLOCK_CHARACTERS_PER_TOKEN = 32
"""A block holds about eight forwards: enough windows for batches of like length, little to lose in a kill."""

_TALLIED_DOCUMENTS, _TALLIED_SECONDS = 5000, 1.0
"""At most, of a block: inputs of fewer documents than a block has share batches with others of less like length."""

_MOST_PROCESSES, _CORES_A_PROCESS = 6, 2.5
"""That cut windows for a GPU. A core turns text into less than half a million tokens a second, a GPU reads millions."""


def dtype_of_model(config: ReadingConfig, device: str) -> torch.dtype:
    """Return the dtype of the model and of its activations."""
    if config.model_dtype == "auto":
        return torch.float32 if resolve_device(device).type == "cpu" else torch.bfloat16
    found: torch.dtype = getattr(torch, config.model_dtype)
    return found


def _loaded(config: ReadingConfig, device: str) -> tuple[nn.Module, Any, Loading, torch.device]:
    """Load the base model of settings: it, its tokenizer, which weights came, and where its activations go."""
    options, place = LoadOptions.of(config), resolve_device(device)
    model, tokenizer, loading = load_with_account(config.model, dtype_of_model(config, device), options)
    model = bare(model)
    if options.device_map is None and options.quantize is None:  # else it lies where it was loaded
        model = moved(config.model, model, place)
    return model, tokenizer, loading, place


def _given(config: ReadingConfig, loaded: tuple[nn.Module, Any]) -> tuple[nn.Module, Any, Loading, None]:
    """Return what `_loaded` returns of a model that is loaded already; its activations stay where they are."""
    beside = [name for name, value in asdict(LoadOptions.of(config)).items() if value != getattr(PLAIN, name)]
    if beside:
        raise ConfigError(f"{beside[0]}: expected nothing beside a model that is loaded already; load it so.")
    return bare(loaded[0]), loaded[1], Loading(), None


class LanguageModelSource:
    """A `StreamSource` of the activations of a language model: each hookpoint is a site, read in the same forward.

    Args:
        config: what to read from which model, and where in it. What is left open is filled in.
        text: the documents.
        hookpoints: module paths or patterns, in place of those of `config`.
        held_out: fraction of the documents that training never sees.
        device: of the model; "auto" is the GPU where there is one.
        loaded: a model (with or without a head) and its tokenizer to use instead of loading `config.model`. The
            model keeps its dtype, device, modes and hooks, and whether it is trained; it runs as for inference.
    Raises:
        ConfigError: no such model or hookpoint, or a context that the model cannot read.
        MissingExtraError: transformers is not installed.
    """

    def __init__(
        self,
        config: ReadingConfig,
        text: TextDataset,
        *,
        hookpoints: Sequence[str] = (),
        held_out: float = 0.05,
        device: str = "auto",
        loaded: tuple[nn.Module, Any] | None = None,
    ) -> None:
        self.config = config = config.filled()
        self.text = text
        self._held_out = check_held_out(held_out)
        self._is_held_out = HeldOut(held_out)
        self._is_given = loaded is not None
        model, self.tokenizer, loading, place = _loaded(config, device) if loaded is None else _given(config, loaded)
        self.warnings = quantized_warning(config.model, model)
        patterns = hookpoints or patterns_in(config.hookpoint)
        self.hookpoints = resolve_hookpoints(model, patterns, text_paths(model, config.side))
        self.name = self._name()
        self._check_context(model)
        if config.shuffle_whole:
            check_any_order(text)
        self._windows = Windows(self.tokenizer, config, vocabulary_size(model, config.side), self._is_held_out)
        self._model = HookedModel(model, self.hookpoints, config.side, place)
        self._forwards, self._replayed = self._forwards_of(self._model), self._replayed_of(self._model)
        self._most_ahead = 1 if self._model.device.type == "cuda" else 0
        seen = look(self._model, self._windows.probe(), config.model)
        if config.pack_apart:
            check_apart(self._model, self._windows.probe(), config.model)
        check_loaded(config.model, loading, seen.trace, self.hookpoints)
        self.widths, self.dtype = seen.widths, seen.dtype

    def _check_context(self, model: nn.Module) -> None:
        limit = context_limit(model, self.tokenizer, self.config.side)
        if self.config.context_length > limit:
            raise ConfigError(
                f"context_length: {self.config.model} reads at most {limit} tokens, got {self.config.context_length}. "
                f"Give --context-length {limit}."
            )

    gives_finite = True
    """What it yields was looked at."""

    @property
    def d_in(self) -> int:
        """Width of the activations of the only site; ConfigError where there are several (see `widths`)."""
        return only_site(self.widths)

    @property
    def row_bytes(self) -> int:
        """Bytes of a token."""
        return sum(self.widths.values()) * self.dtype.itemsize

    @property
    def model_bytes(self) -> int:
        """Memory that the parameters of the model take."""
        return sum(p.numel() * p.element_size() for p in self._model.model.parameters())

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What decides the activations, by name, as JSON: fingerprints of text and model, and the settings.

        Free of paths, so that what was moved is still the same. Model, tokenizer and text are read for it once.
        """
        return {
            "text": self.text.fingerprint,
            "model": self._fingerprint_of_model(),
            **self.config.of_tokens(),
            "hookpoints": list(self.hookpoints),
            "dtype": str(self.dtype).removeprefix("torch."),
            "held_out": self._held_out,
        }

    def _fingerprint_of_model(self) -> str:
        if self._is_given:
            return loaded_fingerprint(self._model.model, self.tokenizer, of_chats=self.text.holds_chats)
        return model_fingerprint(self.config.model, LoadOptions.of(self.config), of_chats=self.text.holds_chats)

    @cached_property
    def fingerprint(self) -> str:
        """Digits that stand for the weights, the tokenizer and the settings of reading, not for text and split."""
        return text_digest([repr(sorted((k, v) for k, v in self.identity.items() if k not in ("text", "held_out")))])

    def at(self, *hookpoints: str) -> LanguageModelSource:
        """Return a source of some of the hookpoints alone; it shares model, tokenizer and text with this one."""
        part = copy(self)
        for known in ("identity", "fingerprint"):
            part.__dict__.pop(known, None)
        part.hookpoints = hookpoints
        part.name = part._name()
        part.widths = {name: self.widths[name] for name in hookpoints}
        part._model = self._model.at(*hookpoints)
        part._forwards, part._replayed = part._forwards_of(part._model), part._replayed_of(part._model)
        return part

    def _forwards_of(self, model: HookedModel) -> Forwards:
        config = self.config
        return Forwards(model, config.model, self.text.name, config.max_norm_ratio, is_apart=config.pack_apart or False)

    def _replayed_of(self, model: HookedModel) -> ReplaysByStream:
        config = self.config
        return ReplaysByStream(model, config.forward_tokens, self._windows.pad_token, config.context_length)

    def _name(self) -> str:
        return f"{self.config.model} at {', '.join(self.hookpoints)} reading {self.text.name}"

    def inputs_in_words(self) -> str:
        """Say what the model reads, and what becomes of it by the first documents; takes about a second.

        Raises:
            ConfigError, DataError: what reading the first documents would.
        """
        block: Block = []
        room, end = _BLOCK_CHARACTERS_PER_TOKEN * self.config.forward_tokens, time.monotonic() + _TALLIED_SECONDS
        for _, number, content in self._documents(None, 0):
            block.append((number, content))
            room -= len(content)
            if len(block) == _TALLIED_DOCUMENTS or room <= 0 or time.monotonic() > end:
                break
        told = f"{self._windows}; {self._windows.tally(block)}"
        ratio = self.config.max_norm_ratio
        return told + (f", beside those that max_norm_ratio = {ratio:g} will leave out" if ratio is not None else "")

    def chunks(
        self, split: Split | None, cursor: Cursor | None = None, max_tokens: int | None = None
    ) -> Iterator[tuple[Chunk, Cursor]]:
        """Yield one epoch, a forward at a time: the same tokens at every hookpoint.

        Args:
            split: "train", "held_out", or None for all documents. The others do not reach the model.
            cursor: start there; None is the beginning. Its "rows" counts the tokens up to there, its "dropped" those
                that the norm filter left out.
            max_tokens: end behind so many tokens, counted from the beginning: the first ones in the order of reading.
        Raises:
            DataError: activations are NaN or Inf; names the hookpoint and the documents.
        """
        place = {"document": 0, "offset": 0, "batch": 0, "dropped": 0, "rows": 0, "rows_before": 0, **(cursor or {})}
        done, dropped, rows, before = (place[name] for name in ("batch", "dropped", "rows", "rows_before"))
        self._replayed.begin()
        ahead: deque[tuple[Launched, Place, int]] = deque()

        def finished() -> tuple[Chunk, Cursor]:
            nonlocal dropped, rows, before
            launched, goes_on, n_done = ahead.popleft()
            chunk, n_dropped = self._forwards.finish(launched)
            dropped += n_dropped
            rows += len(chunk.group)
            before = rows if n_done == 0 else before
            return chunk, {
                **asdict(goes_on), "batch": n_done, "dropped": dropped, "rows": rows, "rows_before": before
            }  # fmt: skip

        for batches, begin, behind in self._batched_blocks(split, Place(place["document"], place["offset"])):
            if max_tokens is not None:
                most = sum(int(batch.keep.sum()) for batch in batches)
                if (before if done else rows + sum(launched.most for launched, _, _ in ahead)) + most > max_tokens:
                    yield from (finished() for _ in range(len(ahead)))  # what they drop decides how many are left
                    most = max_tokens - before
                batches = first_tokens(batches, most)
            for number, batch in enumerate(batches[done:], done + 1):
                goes_on, n_done = (behind, 0) if number == len(batches) else (begin, number)
                ahead.append((self._forwards.launch(batch, self._replayed.here()), goes_on, n_done))
                if len(ahead) > self._most_ahead:
                    yield finished()
            done = 0
            if rows == max_tokens:
                break
        yield from (finished() for _ in range(len(ahead)))

    def _batched_blocks(self, split: Split | None, start: Place) -> Iterator[tuple[list[TokenBatch], Place, Place]]:
        """Yield the batches of blocks with their places; threads read and cut the next ones while the model reads."""
        characters = _BLOCK_CHARACTERS_PER_TOKEN * self.config.forward_tokens
        is_mixed = self.config.shuffle_documents and not self.config.shuffle_whole  # which has its order already
        order = ReadingOrder(characters, self.config.document_seed if is_mixed else None)
        blocks = order.blocks(self._documents(split, start.document), start.offset)

        cutter = self._cutter
        at_once = cutter.processes if isinstance(cutter, WindowsApart) else 1

        def read() -> tuple[Future[list[TokenBatch]], Place, Place] | None:
            found = next(blocks, None)
            return None if found is None else (cutting.submit(cutter.batches, found[0]), found[1], found[2])

        reading, cutting = ThreadPoolExecutor(1, "flashsae-text"), ThreadPoolExecutor(at_once, "flashsae-tokenizer")
        try:
            ahead = deque(reading.submit(read) for _ in range(at_once))
            while (block := ahead.popleft().result()) is not None:
                batches = block[0].result()
                ahead.append(reading.submit(read))
                yield batches, *block[1:]
        finally:
            reading.shutdown(cancel_futures=True)
            cutting.shutdown(cancel_futures=True)

    @cached_property
    def _cutter(self) -> Windows | WindowsApart:
        """What cuts windows: for a GPU, which must not wait for it, other processes."""
        if self._model.device.type != "cuda" or cores() <= 2:
            return self._windows
        processes = max(1, min(_MOST_PROCESSES, int(cores() / _CORES_A_PROCESS)))
        return WindowsApart(self._windows, processes, max(2, cores() // processes))

    @cached_property
    def _in_order(self) -> TextDataset:
        """The text in the order in which it is read, but for what is mixed window by window."""
        config = self.config
        return shuffled(self.text, config.document_seed, config.max_documents) if config.shuffle_whole else self.text

    def _documents(self, split: Split | None, start: int) -> Iterator[tuple[int, int, Content]]:
        """Yield the (place, number, document)s of a split from the place `start` on."""
        limit = self.config.max_documents
        for place, number, document in self._in_order.placed(start):
            if limit is not None and place >= limit:
                return
            if split is None or self._is_held_out(number) == (split == "held_out"):
                yield place, number, document
