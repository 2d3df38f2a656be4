"""The next batch on its way to the GPU while the last one is trained on."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import cycle
from types import TracebackType
from typing import Any

import torch

from flashsae.data.acts import Batch
from flashsae.data.shuffle import Batches

_ROWS_AHEAD, _FORWARDS_AHEAD = 1, 4
"""Batches that are fetched ahead: of rows, which need a slot each, and of a model, whose forwards give several."""


class _Slot:
    """Page-locked memory for a batch, its place on the device, and what must be over before each is written again."""

    def __init__(self, batch: Batch, device: torch.device) -> None:
        self.host, self.device = (
            {
                site: torch.empty(acts.shape, dtype=acts.dtype, pin_memory=is_pinned, device=place)
                for site, acts in batch.items()
            }
            for place, is_pinned in ((torch.device("cpu"), True), (device, False))
        )
        self.copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self.used = torch.cuda.Event()  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class _Fetched:
    """A batch on the device, what it is ready behind, and the slot that it lies in, if any."""

    batch: Batch
    ready: torch.cuda.Event
    slot: _Slot | None


class Prefetcher:
    """Batches on a device, in the order in which they come.

    On a GPU a thread and a stream of its own fetch the next batch while the device works on the last one: they read it
    into page-locked memory and copy it, or run the language model that it comes from. Of these they fetch some, since a
    forward gives several batches or none. On the CPU nothing is read ahead.

    Args:
        batches: what to read. Nobody else may read them meanwhile.
        device: where batches go.
        exclusive: held while a batch is fetched, so that whoever else takes it has the device to itself.
    """

    def __init__(
        self, batches: Batches, device: torch.device, exclusive: AbstractContextManager[Any] | None = None
    ) -> None:
        self._batches = batches
        self._device = device
        self._exclusive = exclusive or nullcontext()
        self._slots: Iterator[_Slot] | None = None
        self._ahead: deque[Future[_Fetched]] = deque()
        self._last: _Slot | None = None
        self._pool: ThreadPoolExecutor | None = None
        if device.type == "cuda":
            self._pool = ThreadPoolExecutor(1, "flashsae-prefetch")
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._stream.wait_stream(torch.cuda.current_stream(device))

    def next_batch(self, *, ahead: int) -> Batch:
        """Return the next batch: [batch_tokens, d] by site, dtype of the source, on the device.

        It is overwritten once one more batch was asked for; work queued on the current stream by then is safe.

        Args:
            ahead: how many batches will be asked for before the state of `batches` is to be saved, this one not
                counted. So many more may be fetched; 0 where it is saved behind this one.
        Raises:
            FlashSAEError: what reading raised.
        """
        if self._pool is None:
            return _moved(self._batches.next_batch(), self._device)
        stream = torch.cuda.current_stream(self._device)
        if self._last is not None:
            self._last.used.record(stream)
        try:
            fetched = self._ahead.popleft().result() if self._ahead else self._fetch()
        except BaseException:
            self._let_be()  # whoever saves what `batches` have given so far does so alone
            raise
        most = _ROWS_AHEAD if fetched.slot else _FORWARDS_AHEAD
        self._ahead.extend(self._pool.submit(self._fetch) for _ in range(min(ahead, most) - len(self._ahead)))
        self._last = fetched.slot
        stream.wait_event(fetched.ready)
        for acts in fetched.batch.values():
            acts.record_stream(stream)
        return fetched.batch

    def _let_be(self) -> None:
        """Begin with no batch more, and wait for the one that is being fetched."""
        ahead, self._ahead = self._ahead, deque()
        wait(each for each in ahead if not each.cancel())

    def _fetch(self) -> _Fetched:
        with self._exclusive, torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            batch = self._batches.next_batch()
            if any(acts.device.type != "cpu" for acts in batch.values()):
                ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
                ready.record(self._stream)
                return _Fetched(_moved(batch, self._device), ready, None)
            if self._slots is None:
                self._slots = cycle([_Slot(batch, self._device) for _ in range(_ROWS_AHEAD + 1)])
            slot = next(self._slots)
            slot.copied.synchronize()  # the last copy out of this page-locked memory
            for site, acts in batch.items():
                slot.host[site].copy_(acts)
            self._stream.wait_event(slot.used)
            for site, acts in slot.host.items():
                slot.device[site].copy_(acts, non_blocking=True)
            slot.copied.record(self._stream)
            return _Fetched(slot.device, slot.copied, slot)

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


def _moved(batch: Batch, device: torch.device) -> Batch:
    return {site: acts.to(device) for site, acts in batch.items()}
