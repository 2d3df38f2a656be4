"""The held-out split: which documents or rows training never sees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from flashsae.data.image_files import ImageFolder
from flashsae.errors import DataError
from flashsae.text.dataset import TextDataset

Split = Literal["train", "held_out"]


def split_mask(group: Tensor, held_out: float, split: Split) -> Tensor:
    """Tell which rows belong to a split. A group is in one split for ever, whatever the order or the seed.

    Args:
        group: [n], int64.
        held_out: fraction of the groups that training never sees.
        split: "train" or "held_out".
    Returns:
        [n], bool.
    Source: the finaliser of splitmix64 (Steele, Lea and Flood 2014) turns a group number into a uniform one.
    """
    h = group.to(torch.int64) + 0x1E3779B97F4A7C15
    h = (h ^ _shift(h, 30)) * -0x40A7B892E31B1A47
    h = (h ^ _shift(h, 27)) * -0x6B2FB644ECCEEE15
    uniform = _shift(h ^ _shift(h, 31), 11).to(torch.float64) / 2**53
    is_held_out = uniform < held_out
    return is_held_out if split == "held_out" else ~is_held_out


@dataclass(frozen=True)
class HeldOut:
    """Which documents are held out, one at a time: as `split_mask`, a hundred times as fast for one.

    Args:
        fraction: of the documents.
    """

    fraction: float

    def __call__(self, document: int) -> bool:
        """Tell whether a document is held out, by its number."""
        h = (document + 0x1E3779B97F4A7C15) & _WORD
        h = (h ^ h >> 30) * (-0x40A7B892E31B1A47 & _WORD) & _WORD
        h = (h ^ h >> 27) * (-0x6B2FB644ECCEEE15 & _WORD) & _WORD
        return ((h ^ h >> 31) >> 11) / 2**53 < self.fraction


_WORD = (1 << 64) - 1


def _shift(h: Tensor, bits: int) -> Tensor:
    """Shift right without copies of the sign bit, which torch lacks for int64."""
    return (h >> bits) & ((1 << (64 - bits)) - 1)


def check_splits(text: TextDataset | ImageFolder, held_out: float | None) -> None:
    """Check, before a model runs, that a text has documents to train on and documents to measure on.

    Args:
        text: read only until both were found.
        held_out: fraction of the documents that training never sees; None if that is not decided yet.
    Raises:
        DataError: there is but one document, or none falls to one of the two parts.
    """
    splits: tuple[Split, ...] = ("train", "held_out")
    seen, missing = 0, set(splits)
    for number, _ in text.numbered():
        seen += 1
        if held_out is None:
            missing -= {"train" if seen == 1 else "held_out"}
        else:
            missing -= {"held_out" if HeldOut(held_out)(number) else "train"}
        if not missing:
            return
    unit = getattr(text, "unit", "documents")
    if seen == 1:
        why, size = f"it is one {unit.removesuffix('s')}, which cannot be split", ""
    elif "held_out" in missing:
        why, size = (
            f"no {unit.removesuffix('s')} fell to the held-out part, {held_out or 0:.3g} of all {seen}",
            " or a larger held_out",
        )
    else:
        why, size = f"all {seen} {unit} fell to the held-out part", " or a smaller held_out"
    hint = " (a .txt is cut into documents at blank lines; .jsonl has one a line)" if text.is_cut_at_blanks else ""
    raise DataError(f"{text.name} is too small: {why}. Give more {unit}{hint}{size}.")
