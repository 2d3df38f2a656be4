"""Forwards of a small model as CUDA graphs: the host, which launches kernels slower than they run, launches one thing.

A graph is used for a shape of inputs only where it gives the very bits of the forward, so that nobody can tell what was
replayed, and where the host is what a forward waits for. Everything else runs as it always does.
"""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flashsae.lm.capture import Pick
from flashsae.lm.hooked import HookedModel

_EAGER = 3
"""Forwards of a shape before it is captured: the first compiles what is missing, the last is looked at."""
_COMPARED = 2
"""Replays of a graph that are compared with the forward."""
_MOST_GRAPHS = 32
_WAITS = 1.25
"""How much longer than the host a forward may take on the device to be one that waits for the host."""


@dataclass
class _Shape:
    """What is known of inputs of a shape.

    Args:
        seen: inputs of it.
        is_left: none of them is replayed.
        graph: of a forward.
        reads: its token ids, and which of them are tokens, None where all are.
        acts: what it writes, by hookpoint.
        compared: replays that gave the bits of the forward.
    """

    seen: int = 0
    is_left: bool = False
    graph: torch.cuda.CUDAGraph | None = None
    reads: tuple[Tensor | None, ...] = ()
    acts: dict[str, Tensor] = field(default_factory=dict)
    compared: int = 0


class Replays:
    """Runs a model, on a GPU by graphs where that is faster and the same.

    One for each reading, on one stream: between two of them the weights may have been replaced, and two would write the
    same memory. Memory: that of a forward, and what each graph writes.

    Args:
        model: to run.
    """

    def __init__(self, model: HookedModel) -> None:
        self._model = model
        self._shapes: dict[tuple[int, ...], _Shape] = {}
        self._pool: tuple[Any, ...] = ()  # of all graphs: none of them runs beside another
        self._can = model.device.type == "cuda" and model.is_plain

    def __call__(self, ids: Tensor, attention: Tensor, pick: Pick) -> dict[str, Tensor]:
        """Return what `HookedModel` does.

        Args:
            ids, attention: [sequences, length], int64, on the CPU.
            pick: as there.
        """
        if self._can:
            # a model looks whether a mask has zeros, which no capture survives: beside all tokens it is given none
            is_full = bool(attention.all())
            shape = self._shapes.setdefault((is_full, *ids.shape), _Shape())
            shape.seen += 1
            if not shape.is_left:
                return self._run(shape, (ids, None if is_full else attention), attention, pick)
        return self._model(self._there(ids), self._there(attention), pick)

    def _there(self, tensor: Tensor) -> Tensor:
        device = self._model.device
        return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)

    def _run(
        self, shape: _Shape, reads: tuple[Tensor, Tensor | None], attention: Tensor, pick: Pick
    ) -> dict[str, Tensor]:
        if shape.graph is not None and shape.compared == _COMPARED:
            self._replay(shape, reads)
            return {name: pick(name, acts) for name, acts in shape.acts.items()}
        if shape.graph is None:
            seen, waits = self._timed(shape, reads[0], attention, pick)
            if shape.seen >= _EAGER:
                shape.is_left = not waits or sum(s.graph is not None for s in self._shapes.values()) == _MOST_GRAPHS
                if not shape.is_left:
                    self._capture(shape, reads)
            return seen
        seen = self._model(self._there(reads[0]), self._there(attention), pick)
        self._replay(shape, reads)
        if all(torch.equal(pick(name, acts), seen[name]) for name, acts in shape.acts.items()):
            shape.compared += 1
        else:
            self._leave(shape)
        return seen

    def _timed(self, shape: _Shape, ids: Tensor, attention: Tensor, pick: Pick) -> tuple[dict[str, Tensor], bool]:
        """Return what is seen, and whether the device waited for the host; that is known of the last eager one."""
        there = self._there(ids), self._there(attention)
        if shape.seen < _EAGER:
            return self._model(*there, pick), False
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        start = time.perf_counter()
        seen = self._model(*there, pick)
        host = time.perf_counter() - start
        end.record()
        end.synchronize()
        return seen, begin.elapsed_time(end) / 1e3 < _WAITS * host

    def _replay(self, shape: _Shape, reads: tuple[Tensor | None, ...]) -> None:
        assert shape.graph is not None
        for there, given in zip(shape.reads, reads, strict=True):
            if there is not None and given is not None:
                there.copy_(given.pin_memory(), non_blocking=True)
        shape.graph.replay()

    def _capture(self, shape: _Shape, reads: tuple[Tensor, Tensor | None]) -> None:
        """Capture the forward; leave the shape alone where that cannot be done, as where the host looks at numbers."""
        ids, attention = (None if each is None else self._there(each) for each in reads)
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(self._model.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self._model.device))
        was_enabled = gc.isenabled()
        gc.disable()  # an older graph among the garbage would be destroyed, which no capture survives
        try:
            assert ids is not None
            # not torch.cuda.graph, which frees all memory at hand, page-locked memory of other threads among it
            with torch.cuda.stream(stream):
                graph.capture_begin(*self._pool, capture_error_mode="thread_local")
                try:
                    shape.acts = self._model(ids, attention)
                finally:
                    graph.capture_end()
            shape.graph, shape.reads, self._pool = graph, (ids, attention), (graph.pool(),)
        except Exception:  # whatever a model does that cannot be captured, it does in the forward
            self._leave(shape)
            torch.cuda.synchronize()
        finally:
            if was_enabled:
                gc.enable()

    def _leave(self, shape: _Shape) -> None:
        shape.is_left, shape.graph, shape.reads, shape.acts = True, None, (), {}
