"""Rows that are held in memory since they will be asked for next, where reading each by itself would take too long."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

Read = Callable[[str, Tensor], Iterator[tuple[slice, Tensor]]]


class Window:
    """The rows of a shuffle's window, read from compressed blocks once instead of at each batch.

    Args:
        read: yields the rows of a site, called with its name and their numbers [n], ascending: which of them, and
            [m, d].
    """

    def __init__(self, read: Read) -> None:
        self._read = read
        self._numbers = torch.empty(0, dtype=torch.int64, device="cpu")
        self._held: dict[str, Tensor] = {}

    def expect(self, index: Tensor) -> None:
        """Hold these rows from now on, [n] in any order; they are read when the first of them is asked for."""
        numbers = torch.from_numpy(np.unique(index.cpu().numpy()))
        if not torch.equal(numbers, self._numbers):
            self._numbers, self._held = numbers, {}

    def rows(self, name: str, wanted: Tensor) -> Iterator[tuple[slice | Tensor, Tensor]]:
        """Yield the rows of a site: wanted [n], ascending -> which of them, and [m, d]."""
        numbers = self._numbers
        place = torch.searchsorted(numbers, wanted).clamp_(max=max(len(numbers) - 1, 0))
        is_here = numbers[place] == wanted if len(numbers) else torch.zeros_like(wanted, dtype=torch.bool)
        here, elsewhere = is_here.nonzero()[:, 0], (~is_here).nonzero()[:, 0]
        if len(here):
            held = self._held.get(name)
            if held is None:
                held = self._held[name] = self._read_all(name, numbers)
            yield here, held[place[here]]
        for part, rows in self._read(name, wanted[elsewhere]) if len(elsewhere) else ():
            yield (elsewhere[part] if len(here) else part), rows

    def _read_all(self, name: str, numbers: Tensor) -> Tensor:
        held: Tensor | None = None
        for part, rows in self._read(name, numbers):
            if held is None:
                held = torch.empty(len(numbers), rows.shape[1], dtype=rows.dtype, device="cpu")
            held[part] = rows
        assert held is not None
        return held
