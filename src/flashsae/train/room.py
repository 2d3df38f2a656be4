"""How much room codes above a threshold get in a training on a GPU, whose host should not wait to learn their size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

PERIOD = 128
"""Steps in a row for which less room has to do before there is less: shapes, and so captured graphs, seldom change."""

_SPARE = 1 / 16  # of the entries, beside them
_LEAST = 256


@dataclass
class Room:
    """Entries that a code has room for, by the counts of the codes so far. A resumed run must go by the same.

    A code that found no room for all is made again with more, before anything was changed by it. So every step is
    exact, and what stands here only decides how often that happens and how much memory lies idle. Above the crossover
    there is room for every latent of every token, as dense matrices.

    Args:
        entries: that there is room for; 0 before the first code.
        is_full: whether codes are full ones.
        largest: most entries of a code within the last steps.
        steps: how many steps these are.
    """

    entries: int = 0
    is_full: bool = False
    largest: int = 0
    steps: int = 0

    @property
    def capacity(self) -> int | Literal["full"]:
        """What `ops.encode_above` takes."""
        return "full" if self.is_full else self.entries

    def fits(self, count: int, crossover: int) -> bool:
        """Tell whether there was room for a code of so many entries; if not, there is from now on.

        Args:
            count: entries that the code wanted.
            crossover: entries above which a full code is faster.
        """
        if self.is_full or count <= self.entries:
            return True
        self._make(count, crossover)
        return False

    def done(self, count: int, crossover: int) -> None:
        """Note the code of a step that was done; where PERIOD steps needed clearly less room, give them less."""
        self.largest, self.steps = max(self.largest, count), self.steps + 1
        if self.steps < PERIOD:
            return
        if _wanted(self.largest) < 7 / 8 * (crossover if self.is_full else self.entries):
            self._make(self.largest, crossover)
        self.largest = self.steps = 0

    def _make(self, count: int, crossover: int) -> None:
        self.entries, self.is_full = min(_wanted(count), max(count, crossover)), count > crossover
        self.largest = self.steps = 0


def read_number(number: Tensor) -> int:
    """Return what is on the device as soon as it is computed there: what is launched behind it is not waited for."""
    if not number.is_cuda:
        return int(number)
    here = torch.empty((), dtype=number.dtype, device="cpu", pin_memory=True).copy_(number, non_blocking=True)
    is_read = torch.cuda.Event()  # type: ignore[no-untyped-call]
    is_read.record()
    is_read.synchronize()
    return int(here)


def _wanted(count: int) -> int:
    """Return entries and some more, as a multiple of an eighth of the power of two below: few values."""
    entries = max(_LEAST, count + int(_SPARE * count) + 1)
    step = max(_LEAST, 1 << (entries.bit_length() - 4))
    return -(-entries // step) * step
