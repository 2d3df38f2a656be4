"""What a language model reads, and where in it activations are taken."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from flashsae.errors import ConfigError
from flashsae.settings.kinds import (
    JOINED,
    AtMost,
    KeyValues,
    LeftOpen,
    NonNegativeInt,
    PositiveInt,
    Range,
    check_fields,
    declared_types,
)
from flashsae.settings.left_open import default_values, fill, given, left_open

MINILM = "minilm"
"""The model that comes with the extra demo."""
PYTHON_DOCS = "python-docs"
"""The text that needs no download."""
DEFAULT_HOOKPOINTS = {
    1: "encoder.layer.2",
    2: "encoder.layer.2.intermediate:in, encoder.layer.2.output.dense",  # an MLP, before its result is added
    0: "encoder.layer.{1,2,3}",
}
"""Of minilm, by the number of sites of an SAE: one, what it reads and what it writes, or all that there are."""
OF_TEXT = tuple(f"text_{n}" for n in ("column", "split", "subset", "revision", "download", "dtype", "separator"))
"""Settings that say which text is meant, beside its name."""
_TOLD_BESIDE = (
    *("model", "dataset", *OF_TEXT),  # by fingerprints
    *("revision", "subfolder", "adapter"),  # by the fingerprint of the model
    "device_map",  # where it is computed is not what
    *("hookpoint", "model_dtype", "cache_dtype", "cache_compression"),  # as what they are resolved to
)
_ADDED_LATER = (
    *("shuffle_whole", "bos_every", "pack", "pack_apart", "overlap", "assistant_only", "cache_compression"),
    *("model_kwargs", "quantize", "trust_remote_code", "side"),
)
"""Settings that the first caches and runs were written without. At its default each is as if it were not there, so that
those go on, under the names and fingerprints that they have."""
_OF_CACHE = ("cache_dtype", "cache_compression")
TABLES = ("model_kwargs", "model-kwargs")
"""Settings that are a table in a file."""

MoreThanOne = Annotated[float, Range("a number above 1", lambda value: 1 < value < float("inf"))]

Config = TypeVar("Config", bound="ReadingConfig")


def check_held_out(fraction: float) -> float:
    """Return `fraction` if it can be a held-out fraction, else raise ConfigError."""
    if not 0.0 <= fraction < 1.0:
        raise ConfigError(f"held_out is a fraction of the data: expected 0 <= held_out < 1, got {fraction}.")
    return fraction


@dataclass(frozen=True)
class ReadingConfig:
    """What a language model reads, and where in it activations are taken.

    Args:
        model: Model to read: a name on the Hugging Face hub, a folder, or minilm, which comes with
            the extra demo. Default: minilm.
        dataset: Text to read: a name on the Hugging Face hub; a file, .txt .jsonl .json .csv .tsv .parquet .arrow, most
            of them also .gz or .zst, or .npy or .bin of token ids; a folder of such, or of images for a model that
            reads these; or python-docs, which ships with Python. Several with their shares of the characters are a
            mixture: code@0.7 books@0.3; may have commas between, or be repeated. One that ends begins again until each
            was read once. Default: python-docs.
        hookpoint: Module path in the model whose output is taken, such as layers.6 or h.3.mlp; h.3.mlp:in is its
            input. A * stands for anything but a dot, {1,3} for 1 and 3: an SAE for each match, or one crosscoder of
            all. May be repeated, or have commas between several. A transcoder takes what it reads and what it writes;
            a module alone stands for its input and output. Default: in minilm encoder.layer.2, or its MLP for a
            transcoder, or {1,2,3} for a crosscoder; with a cache, all that it holds.
        context_length: Tokens in one input of the model. Default: 256.
        mask_special: Leave out special tokens. Default: yes.
        max_norm_ratio: Leave out tokens whose norm exceeds so many times the median. Default: keep all.
        skip_first: Leave out so many positions at the beginning of each input of the model, special tokens counted: the
            first ones are attention sinks in many models. Default: 0.
        exclude_ids: Leave out the tokens with these ids. May be repeated.
        prepend_bos: Begin each input with the tokenizer's BOS token, or with --no-prepend-bos never. Default: as the
            tokenizer does it.
        bos_every: Where this BOS token stands: at the beginning of each context, or of each document alone, so that
            what goes on with a document begins without it. Default: context.
        pack: Fill each input of the model with documents, one behind another and a token between them that ends one
            (what the tokenizer puts behind a text, else EOS, else BOS), each of which attends to what stands before it;
            --no-pack gives every document inputs of its own. Default: no.
        pack_apart: Let no packed document see another one, and its positions begin at 0, as if it stood alone. For
            models whose attention goes by positions, as most that write text; tried at the start. Default: no.
        overlap: Begin each input that goes on with a document with so many tokens of the input before. They are
            context alone and not taken again. Default: 0.
        assistant_only: Of chats, take only what the assistant says, where the chat template marks it. Default: no.
        shuffle_documents: Read documents in an order that document_seed decides, mixed over some millions of
            characters at a time; --no-shuffle-documents keeps that of the data set. Default: yes.
        shuffle_whole: Mix them over the whole data set, of a mixture each by itself. Files of text are copied to a
            temporary file for it; what can only be streamed is refused. Default: no.
        document_seed: Of the order of the documents. Default: 0.
        max_documents: Read only so many documents of the text, the first ones. Default: all.
        text_column: Column of the data set that holds the text, token ids or messages; several of text, with commas
            between, are joined by a newline; behind one of token ids may stand the one that tells which of them are
            taken. Default: text, or the only one of input_ids, messages and conversations.
        text_split: Split of a hub data set, or of a folder whose files or folders are named after splits. Default:
            train; in a folder without such names, everything.
        text_subset: Subset (configuration) of a hub data set, or of a clone of one. Default: the only one.
        text_revision: Branch, tag or commit of a hub data set. Default: the newest.
        text_download: Download a hub data set instead of streaming it. Default: no.
        text_dtype: Of the token ids in a .bin that does not say it. Default: refuse such a file.
        text_separator: The id that stands between documents in a .npy or .bin, mostly EOS. Default: none, which cuts
            pieces of 8192 tokens.
        forward_tokens: Tokens in one forward of the model, padding included. Default: 8192, or context_length if
            that is more.
        model_dtype: Of the model: float32, bfloat16, float16, or auto, which is float32 on a CPU and bfloat16 on a GPU.
            Default: auto.
        revision: Branch, tag or commit of a model on the hub. Default: its main branch.
        subfolder: Folder inside that of the model, where its files are.
        model_kwargs: Argument for the model as transformers takes it, NAME=VALUE, such as attn_implementation=eager;
            in a file a table, model_kwargs = { attn_implementation = "eager" }. May be repeated.
        quantize: Weights of 8bit or 4bit, by bitsandbytes: the model takes less memory, and its activations are others
            than those of the model itself. Default: as they are saved.
        device_map: Spread the model over several GPUs, and what does not fit over memory and disk, by accelerate: auto,
            balanced, balanced_low_0 or sequential. Default: all of it on one device.
        trust_remote_code: Run the Python code that a model brings along, with all your rights. Nothing but this option
            ever runs it. Default: no.
        adapter: Adapter to put onto the model, by peft: a folder with adapter_config.json, or a name on the hub. A
            model may also be such a folder, which names its base. Default: none.
        side: Of a model with an encoder and a decoder, which of the two reads the text: encoder or decoder. The
            decoder begins with its start token, which gives no row; the encoder reads its end token alone meanwhile.
            Default: encoder.
        cache_dtype: Of cached activations: bf16; float32 at twice the size, for activations whose mean is far
            larger than their spread; or int8 at half the size, which rounds away some 4e-5 of their variance. Default:
            bf16.
        cache_compression: Of cached activations: none, or zstd, which saves a third of bf16 and little of int8, and
            costs time whenever they are read. Default: none.
    """

    model: LeftOpen[str] = left_open(MINILM, kw_only=False)
    dataset: LeftOpen[Annotated[str, JOINED]] = left_open(PYTHON_DOCS, kw_only=False)
    hookpoint: LeftOpen[str] = left_open(DEFAULT_HOOKPOINTS[1])
    context_length: LeftOpen[Annotated[PositiveInt, AtMost("forward_tokens")]] = left_open(256)
    mask_special: LeftOpen[bool] = left_open(True)
    max_norm_ratio: MoreThanOne | None = field(default=None, kw_only=True)
    skip_first: LeftOpen[NonNegativeInt] = left_open(0)
    exclude_ids: LeftOpen[tuple[NonNegativeInt, ...]] = left_open(())
    prepend_bos: bool | None = field(default=None, kw_only=True)
    bos_every: LeftOpen[Literal["context", "document"]] = left_open("context")
    pack: LeftOpen[bool] = left_open(False)
    pack_apart: LeftOpen[bool] = left_open(False)
    overlap: LeftOpen[NonNegativeInt] = left_open(0)
    assistant_only: LeftOpen[bool] = left_open(False)
    shuffle_documents: LeftOpen[bool] = left_open(True)
    shuffle_whole: LeftOpen[bool] = left_open(False)
    document_seed: LeftOpen[NonNegativeInt] = left_open(0)
    max_documents: PositiveInt | None = field(default=None, kw_only=True)
    text_column: str | None = field(default=None, kw_only=True)
    text_split: str | None = field(default=None, kw_only=True)
    text_subset: str | None = field(default=None, kw_only=True)
    text_revision: str | None = field(default=None, kw_only=True)
    text_download: bool | None = field(default=None, kw_only=True)
    text_dtype: Literal["uint16", "uint32", "int32", "int64"] | None = field(default=None, kw_only=True)
    text_separator: NonNegativeInt | None = field(default=None, kw_only=True)
    forward_tokens: LeftOpen[PositiveInt] = left_open(lambda config: max(8192, config.context_length))
    model_dtype: LeftOpen[Literal["auto", "float32", "bfloat16", "float16"]] = left_open("auto")
    revision: str | None = field(default=None, kw_only=True)
    subfolder: str | None = field(default=None, kw_only=True)
    model_kwargs: LeftOpen[Annotated[tuple[str, ...], KeyValues()]] = left_open(())
    quantize: Literal["8bit", "4bit"] | None = field(default=None, kw_only=True)
    device_map: Literal["auto", "balanced", "balanced_low_0", "sequential"] | None = field(default=None, kw_only=True)
    trust_remote_code: LeftOpen[bool] = left_open(False)
    adapter: str | None = field(default=None, kw_only=True)
    side: Literal["encoder", "decoder"] | None = field(default=None, kw_only=True)
    cache_dtype: LeftOpen[Literal["bf16", "float32", "int8"]] = left_open("bf16")
    cache_compression: LeftOpen[Literal["none", "zstd"]] = left_open("none")

    def __post_init__(self) -> None:
        check_fields(self)
        if self.exclude_ids is not None:
            object.__setattr__(self, "exclude_ids", tuple(sorted(set(self.exclude_ids))))
        if self.model_kwargs is not None:
            object.__setattr__(self, "model_kwargs", tuple(sorted(self.model_kwargs)))
        if self.context_length is not None and (self.skip_first or 0) >= self.context_length:
            raise ConfigError(
                f"skip_first: expected fewer than the {self.context_length} tokens of an input (context_length), got "
                f"{self.skip_first}."
            )
        if self.context_length is not None and (self.overlap or 0) >= self.context_length:
            raise ConfigError(
                f"overlap: expected fewer than the {self.context_length} tokens of an input (context_length), got "
                f"{self.overlap}."
            )
        if self.bos_every == "document" and self.prepend_bos is False:
            raise ConfigError(
                "bos_every: expected nothing beside --no-prepend-bos, with which no input begins with BOS."
            )
        if self.pack_apart and not self.pack:
            raise ConfigError("pack_apart: expected --pack beside it; documents that are not packed are apart.")
        if self.document_seed and self.shuffle_documents is False:
            raise ConfigError("document_seed: expected nothing beside --no-shuffle-documents, which needs no seed.")
        if self.shuffle_whole and self.shuffle_documents is False:
            raise ConfigError("shuffle_whole: expected nothing beside --no-shuffle-documents, which mixes nothing.")

    def filled(self: Config, sites: int = 1) -> Config:
        """Return the settings with what was left open at its default; None is left only where it means something.

        Args:
            sites: of an SAE; 0 where it takes all that there are.
        Raises:
            ConfigError: there is a model and no hookpoint, or an input of the model is longer than a forward.
        """
        settings, model = self, given(self).get("model", MINILM)
        if "hookpoint" not in given(self):
            default = DEFAULT_HOOKPOINTS.get(sites)
            if default is None or model != MINILM:
                raise ConfigError(
                    f"hookpoint: expected a module path of {model}, such as --hookpoint layers.6 or h.6, got nothing."
                )
            settings = replace(self, hookpoint=default)
        return fill(settings, but=self._unused())

    def _unused(self) -> tuple[str, ...]:
        """Return the settings that stay open."""
        return ()

    def of_tokens(self, *, whole: bool = False) -> dict[str, Any]:
        """Return what decides which tokens are read and how, by name, as JSON has it.

        Model, text, hookpoints and dtypes are not among it: what they are, not what they are called, is told beside it
        in the identity of a source, in the index of a cache and in the name of its folder.

        Args:
            whole: tell also of the settings that were added later and are at their default (see `defaults_of_later`).
        """
        names = [name for name in declared_types(ReadingConfig) if name not in _TOLD_BESIDE]
        told = {name: _as_json(getattr(self, name)) for name in names}
        if whole:
            return told
        untold = defaults_of_later()
        return {n: v for n, v in told.items() if n not in _ADDED_LATER or v not in (None, untold.get(n))}


def defaults_of_later() -> dict[str, Any]:
    """Return what the settings that were added later are where caches and runs tell nothing of them, by name."""
    defaults = default_values(ReadingConfig())
    return {name: _as_json(defaults[name]) for name in _ADDED_LATER if name in defaults}


def _as_json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


@dataclass(frozen=True)
class ActivationsConfig(ReadingConfig):
    """Which activations to train on.

    Args:
        activations: Folder of a cache of activations, as flashsae cache writes it. Where a model and a text are named
            too and there is none, it is written first. Default: a cache beside the run, or none if it would exceed
            8 GB.
        stream: Run the model beside the training and write no cache; --no-stream always writes one.
        held_out: Fraction of the documents that training never sees; the final figures are measured on them.
    """

    activations: Path | None = field(default=None, kw_only=True)
    stream: bool | None = field(default=None, kw_only=True)
    held_out: float = field(default=0.05, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if check_held_out(self.held_out) == 0.0:
            raise ConfigError("held_out: expected more than 0, since the final figures are measured on it, got 0.")
        if self.stream and self.activations is not None:
            raise ConfigError("stream: expected no --activations beside --stream, which writes and reads no cache.")
        for name in _OF_CACHE if self.stream else ():
            if getattr(self, name) is not None:
                option = f"--{name.replace('_', '-')}"
                raise ConfigError(f"stream: expected no {option} beside --stream, which writes no cache.")

    def _unused(self) -> tuple[str, ...]:
        return _OF_CACHE if self.stream else ()
