"""What a language model reads, and where in it activations are taken."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from flashsae.errors import ConfigError
from flashsae.settings.kinds import NonNegativeInt, PositiveInt, Range, check_fields

MINILM = "minilm"
"""The model that comes with the extra demo."""
PYTHON_DOCS = "python-docs"
"""The text that needs no download."""
DEFAULT_HOOKPOINT = "encoder.layer.2"
DEFAULT_CONTEXT_LENGTH = 256

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
        dataset: Text to read: a name on the Hugging Face hub, a .txt, .jsonl or .parquet file, a folder of such, or
            python-docs, which ships with Python. Default: python-docs.
        hookpoint: Module path in the model whose output is taken, such as layers.6 or h.3.mlp. A * stands for
            anything but a dot and trains one SAE for each match. Default: encoder.layer.2 of minilm; with a cache,
            all that it holds.
        context_length: Tokens in one input of the model. Default: 256.
        mask_special: Leave out special tokens. Default: yes.
        max_norm_ratio: Leave out tokens whose norm exceeds so many times the median. Default: keep all.
        skip_first: Leave out so many positions at the beginning of each input of the model, special tokens counted: the
            first ones are attention sinks in many models. Default: 0.
        exclude_ids: Leave out the tokens with these ids. May be repeated.
        prepend_bos: Begin each input with the tokenizer's BOS token, or with --no-prepend-bos never. Default: as the
            tokenizer does it.
        shuffle_documents: Read documents in an order that document_seed decides, mixed over some millions of
            characters at a time; --no-shuffle-documents keeps that of the data set. Default: yes.
        document_seed: Of the order of the documents. Default: 0.
        text_column: Column of the data set that holds the text. Default: text.
        text_split: Split of a hub data set, or of a folder whose files or folders are named after splits. Default:
            train; in a folder without such names, everything.
        text_subset: Subset (configuration) of a hub data set. Default: the only one.
        cache_dtype: Of cached activations: bf16, or float32 at twice the size, for activations whose mean is far
            larger than their spread. Default: bf16.
    """

    model: str | None = None
    dataset: str | None = None
    hookpoint: str | None = field(default=None, kw_only=True)
    context_length: PositiveInt | None = field(default=None, kw_only=True)
    mask_special: bool | None = field(default=None, kw_only=True)
    max_norm_ratio: MoreThanOne | None = field(default=None, kw_only=True)
    skip_first: NonNegativeInt | None = field(default=None, kw_only=True)
    exclude_ids: tuple[NonNegativeInt, ...] | None = field(default=None, kw_only=True)
    prepend_bos: bool | None = field(default=None, kw_only=True)
    shuffle_documents: bool | None = field(default=None, kw_only=True)
    document_seed: NonNegativeInt | None = field(default=None, kw_only=True)
    text_column: str | None = field(default=None, kw_only=True)
    text_split: str | None = field(default=None, kw_only=True)
    text_subset: str | None = field(default=None, kw_only=True)
    cache_dtype: Literal["bf16", "float32"] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.exclude_ids is not None:
            object.__setattr__(self, "exclude_ids", tuple(sorted(set(self.exclude_ids))))
        if self.context_length is not None and (self.skip_first or 0) >= self.context_length:
            raise ConfigError(
                f"skip_first: expected fewer than the {self.context_length} tokens of an input (context_length), got "
                f"{self.skip_first}."
            )
        if self.document_seed is not None and self.shuffle_documents is False:
            raise ConfigError("document_seed: expected nothing beside --no-shuffle-documents, which needs no seed.")

    def filled(self: Config) -> Config:
        """Return the settings with every default that is fixed filled in.

        Raises:
            ConfigError: there is a model and no hookpoint.
        """
        if self.hookpoint is None and self.model not in (None, MINILM):
            raise ConfigError(
                f"hookpoint: expected a module path of {self.model}, such as --hookpoint layers.6 or h.6, got nothing."
            )
        return replace(
            self,
            model=self.model or MINILM,
            dataset=self.dataset or PYTHON_DOCS,
            hookpoint=self.hookpoint or DEFAULT_HOOKPOINT,
            context_length=self.context_length or DEFAULT_CONTEXT_LENGTH,
            mask_special=self.mask_special is not False,
            skip_first=self.skip_first or 0,
            exclude_ids=self.exclude_ids or (),
            shuffle_documents=self.shuffle_documents is not False,
            document_seed=None if self.shuffle_documents is False else self.document_seed or 0,
            cache_dtype=None if getattr(self, "stream", None) else self.cache_dtype or "bf16",
        )


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
        if self.stream and self.cache_dtype is not None:
            raise ConfigError("stream: expected no --cache-dtype beside --stream, which writes no cache.")
