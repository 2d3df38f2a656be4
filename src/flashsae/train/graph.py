"""Steps as CUDA graphs: the host launches one thing instead of a hundred."""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from threading import Lock

import torch
from torch import Tensor

from flashsae.data.acts import Batch

Step = Callable[[Batch], dict[str, Tensor]]


class CapturedSteps:
    """Runs a step; on a GPU the second one of a kind is captured as a graph, and replayed from then on.

    Only the graph of the newest kind is kept: kinds follow each other, and a graph keeps the memory of a step.
    """

    def __init__(self) -> None:
        self._kind: Hashable = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._batch: Batch = {}
        self._metrics: dict[str, Tensor] = {}
        self.capturing = Lock()
        """Held while a step is captured: no other thread may then draw random numbers on the device."""

    def __call__(self, step: Step, batch: Batch, kind: Hashable) -> dict[str, Tensor]:
        """Do one step.

        Args:
            step: from a batch to scalars. Changes tensors in place, and waits for nothing.
            batch: [B, d] by site, on one device.
            kind: of everything that decides what `step` launches, besides sites, shapes and dtypes of the batch.
        Returns:
            scalars on the device, to be read before the next step.
        """
        if next(iter(batch.values())).device.type != "cuda":
            return step(batch)
        kind = (kind, *((site, x.shape, x.dtype) for site, x in batch.items()))
        if kind != self._kind:
            self._kind, self._graph, self._batch, self._metrics = kind, None, {}, {}
            return step(batch)  # compiles what is missing, which a capture must not
        if self._graph is None:
            self._batch, self._graph = {site: x.clone() for site, x in batch.items()}, torch.cuda.CUDAGraph()
            with self.capturing, _garbage_kept(), torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._metrics = step(self._batch)
        else:
            for site, x in batch.items():
                self._batch[site].copy_(x)
        self._graph.replay()
        return self._metrics


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
