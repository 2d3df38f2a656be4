"""Steps as CUDA graphs: the host launches one thing instead of a hundred."""

from __future__ import annotations

import gc
from collections.abc import Callable, Generator, Hashable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any, cast

import torch
from torch import Tensor

from flashsae.data.acts import Batch

Metrics = dict[str, Tensor]
Parts = Callable[[Batch], Generator[Any, None, None]]
"""A step in parts: what each yields is known when its part was done; the last one yields scalars."""


class CapturedSteps:
    """Runs a step; on a GPU the second one of a kind is captured as a graph, and replayed from then on.

    A step into which the host looks is captured as two graphs, between which it does. They share their memory: what the
    first one leaves, such as the graph of autograd, is what the second one was captured with, and both are always
    replayed in this order. A first one without the second changes nothing.

    Only the graphs of the newest kind are kept: kinds follow each other, and a graph keeps the memory of a step.
    """

    def __init__(self) -> None:
        self._kind: Hashable = None
        self._graphs: list[torch.cuda.CUDAGraph] = []
        self._batch: Batch = {}
        self._results: list[Any] = []  # of each part: what it yielded
        self._stream: torch.cuda.Stream | None = None  # on which graphs are captured
        self.capturing = Lock()
        """Held while a step is captured: no other thread may then draw random numbers on the device."""

    def __call__(self, step: Callable[[Batch], Metrics], batch: Batch, kind: Hashable) -> Metrics:
        """Do one step.

        Args:
            step: from a batch to scalars. Changes tensors in place, and waits for nothing.
            batch: [B, d] by site, on one device.
            kind: of everything that decides what `step` launches, besides sites, shapes and dtypes of the batch.
        Returns:
            scalars on the device, to be read before the next step.
        """

        def whole(batch: Batch) -> Generator[Any, None, None]:
            yield step(batch)

        metrics: Metrics | None = self.in_parts(whole, batch, kind)
        assert metrics is not None
        return metrics

    def in_parts(
        self, step: Parts, batch: Batch, kind: Hashable, goes_on: Callable[[Any], bool] | None = None
    ) -> Metrics | None:
        """Do one step whose host decides behind the first part whether it goes on.

        Args:
            step, batch, kind: as in a call; `step` yields once, or twice where it is looked into.
            goes_on: of what the first part yielded, whether the second part is to be done. It may wait for the device,
                and is asked where no graph is being captured. None where there is one part.
        Returns:
            scalars as from a call; None where the second part was not done.
        """
        kind = (kind, *((site, x.shape, x.dtype) for site, x in batch.items()))
        is_eager = next(iter(batch.values())).device.type != "cuda"
        if is_eager or kind != self._kind:
            self._forget()
            parts = step(batch)
            result: Any = next(parts)  # compiles what is missing, which a capture must not
            if goes_on is not None:
                result = next(parts) if goes_on(result) else None
            parts.close()
            self._kind = kind if result is not None and not is_eager else None
            return cast("Metrics | None", result)
        if self._graphs:
            for site, x in batch.items():
                self._batch[site].copy_(x)
            return self._replayed(goes_on)
        self._batch = {site: x.clone() for site, x in batch.items()}
        parts = step(self._batch)
        self._capture(parts, is_last=goes_on is None)
        self._graphs[0].replay()
        if goes_on is not None:
            if not goes_on(self._results[0]):
                parts.close()
                self._forget()
                return None
            self._capture(parts, is_last=True)
            self._graphs[1].replay()
        return cast("Metrics", self._results[-1])

    def _replayed(self, goes_on: Callable[[Any], bool] | None) -> Metrics | None:
        self._graphs[0].replay()
        if goes_on is not None:
            if not goes_on(self._results[0]):
                return None
            self._graphs[1].replay()
        return cast("Metrics", self._results[-1])

    def _capture(self, parts: Generator[Any, None, None], *, is_last: bool) -> None:
        """Capture the next part, in the memory of the one before it.

        A kernel in a graph has the priority of the stream on which it was captured. Those of a step go before those of
        a model that is read meanwhile: many of them are small, and each would wait until a large one has room for it.
        """
        graph = torch.cuda.CUDAGraph()
        pool = self._graphs[0].pool() if self._graphs else None
        device = next(iter(self._batch.values())).device
        if self._stream is None:
            self._stream = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
        capture = torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local")
        with self.capturing, _garbage_kept(), capture:
            self._results.append(next(parts))
            if is_last:
                parts.close()  # what it holds is given back to the pool of the graphs
        self._graphs.append(graph)

    def _forget(self) -> None:
        self._kind, self._graphs, self._batch, self._results = None, [], {}, []


@contextmanager
def _garbage_kept() -> Iterator[None]:
    """Collect no garbage meanwhile: an older graph among it would be destroyed, which no capture survives."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
