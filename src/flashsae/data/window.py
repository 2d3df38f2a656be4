"""Rows that are held in memory since they will be asked for next, where reading each by itself would take too long."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

Read = Callable[[str, Tensor], Iterator[tuple[slice, Tensor]]]


class RowWindows:
    """The rows of the windows of shuffles, read from compressed blocks once instead of at each batch.

    Args:
        read: yields the rows of a site, called with its name and their numbers [n], ascending: which of them, and
            [m, d].
    """

    def __init__(self, read: Read) -> None:
        self._read = read
        self._windows: WeakKeyDictionary[object, _Window] = WeakKeyDictionary()

    def expect(self, index: Tensor, reader: object) -> None:
        """Hold the rows that a reader will ask for, [n] in any order, in place of those that it expected before.

        They are read when the first of them is asked for.
        """
        numbers = torch.from_numpy(np.unique(index.cpu().numpy()))
        window = self._windows.get(reader)
        if window is None or not torch.equal(numbers, window.numbers):
            self._windows.pop(reader, None)
            window = None  # before the next one is read
            self._windows[reader] = _Window(numbers)

    def rows(self, name: str, wanted: Tensor) -> Iterator[tuple[slice | Tensor, Tensor]]:
        """Yield the rows of a site: wanted [n], ascending -> which of them, and [m, d]."""
        windows = list(self._windows.values())
        if not windows:
            yield from self._read(name, wanted)
            return
        left = torch.arange(len(wanted), dtype=torch.int64, device="cpu")
        for window in windows:
            place, is_here = window.find(wanted[left])
            if is_here.any():
                yield left[is_here], window.rows(name, self._read)[place[is_here]]
                left = left[~is_here]
        for part, rows in self._read(name, wanted[left]) if len(left) else ():
            yield left[part], rows


class _Window:
    """Rows of several sites, by numbers [n] that ascend."""

    def __init__(self, numbers: Tensor) -> None:
        self.numbers = numbers
        self._held: dict[str, Tensor] = {}

    def find(self, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Return where rows are here, if they are, and which are: [n] each."""
        if not len(self.numbers):
            return torch.zeros_like(wanted), torch.zeros_like(wanted, dtype=torch.bool)
        place = torch.searchsorted(self.numbers, wanted).clamp_(max=len(self.numbers) - 1)
        return place, self.numbers[place] == wanted

    def rows(self, name: str, read: Read) -> Tensor:
        """Return all rows of a site: [n, d]."""
        if name not in self._held:
            held: Tensor | None = None
            for part, rows in read(name, self.numbers):
                if held is None:
                    held = torch.empty(len(self.numbers), rows.shape[1], dtype=rows.dtype, device="cpu")
                held[part] = rows
            assert held is not None
            self._held[name] = held
        return self._held[name]
