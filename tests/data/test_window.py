from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from flashsae.data.window import RowWindows


class Reader:
    """Whoever reads, such as a shuffle."""


def test_rows_that_were_announced_are_read_once_and_others_each_time() -> None:
    x = torch.randn(100, 3)
    read: list[list[int]] = []

    def read_rows(name: str, wanted: Tensor) -> Iterator[tuple[slice, Tensor]]:
        read.append(wanted.tolist())
        for low in range(0, len(wanted), 7):
            part = slice(low, min(low + 7, len(wanted)))
            yield part, x[wanted[part]]

    window, reader, other = RowWindows(read_rows), Reader(), Reader()

    def rows(*wanted: int) -> Tensor:
        index = torch.tensor(wanted, dtype=torch.int64)
        out = torch.full((len(index), 3), torch.nan)
        for place, part in window.rows("a", index):
            out[place] = part
        return out

    assert torch.equal(rows(3, 5, 99), x[[3, 5, 99]])
    window.expect(torch.tensor([9, 30, 2, 31, 50]), reader)
    assert read == [[3, 5, 99]], "nothing is read before it is asked for"
    assert torch.equal(rows(9, 31), x[[9, 31]])
    assert read[1:] == [[2, 9, 30, 31, 50]]
    assert torch.equal(rows(0, 2, 2, 50, 98), x[[0, 2, 2, 50, 98]])
    assert read[2:] == [[0, 98]]
    window.expect(torch.tensor([50, 31, 30, 9, 2]), reader)  # the next epoch of a cache that is one window
    assert torch.equal(rows(30), x[[30]])
    assert not read[3:]
    window.expect(torch.tensor([60]), reader)
    assert torch.equal(rows(30, 60), x[[30, 60]])
    assert read[3:] == [[60], [30]]
    assert rows().shape == (0, 3)
    window.expect(torch.tensor([], dtype=torch.int64), reader)
    assert torch.equal(rows(4), x[[4]])
    window.expect(torch.tensor([60, 61]), reader)
    window.expect(torch.tensor([70, 71]), other)
    read.clear()
    assert torch.equal(rows(1, 60, 61, 70), x[[1, 60, 61, 70]])
    assert sorted(read) == [[1], [60, 61], [70, 71]]
    assert torch.equal(rows(60, 71), x[[60, 71]])
    assert len(read) == 3
    del other
    assert torch.equal(rows(71), x[[71]])
    assert read[3:] == [[71]], "what nobody reads any more is not held"
