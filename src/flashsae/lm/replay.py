"""Forwards of a small model as CUDA graphs: the host, which launches kernels slower than they run, launches one thing.

A graph is used for a shape of inputs only where it gives the very bits of the forward, so that nobody can tell what was
replayed, and where the host is what a forward waits for. Everything else runs as it always does.
"""

from __future__ import annotations

import gc
import time
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from flashsae.lm.capture import Pick
from flashsae.lm.hooked import HookedModel

_EAGER = 2
"""Forwards of a shape before it is captured: the first compiles what is missing, the last is looked at."""
_COMPARED = 1
"""Replays of a graph that are compared with the forward."""
_MOST_GRAPHS = 256
_WAITS = 1.25
"""How much longer than the host a forward may take on the device to be one that waits for the host."""


@dataclass
class _Captured:
    """A forward as a graph.

    Args:
        graph: to be replayed.
        ids: [sequences, length], what it reads.
        mask: which of these are tokens; None where it was given none.
        acts: what it writes, by hookpoint.
        compared: replays that gave the bits of the forward.
    """

    graph: torch.cuda.CUDAGraph
    ids: Tensor
    mask: Tensor | None
    acts: dict[str, Tensor]
    compared: int = 0


@dataclass
class _Shape:
    """What is known of inputs of a shape.

    Args:
        ways: to capture the forward that were not tried yet: with a mask, or without. A model looks whether a mask has
            zeros, and takes another kernel if it has none; in a capture it cannot look.
        seen: inputs of it.
        captured: by the way tried last.
    """

    ways: list[bool]
    seen: int = 0
    captured: _Captured | None = None


class Replays:
    """Runs a model, on a GPU by graphs where that is faster and the same.

    One for each reading, on one stream: between two of them the weights may have been replaced, and two would write the
    same memory. Memory: that of one forward and of what it gives, which all graphs share.

    Args:
        model: to run.
    """

    def __init__(self, model: HookedModel) -> None:
        self._model = model
        self._shapes: dict[tuple[int, ...], _Shape] = {}
        self._given: dict[str, Tensor] = {}  # memory that all graphs write, by hookpoint
        self._can = model.device.type == "cuda" and model.is_plain

    def __call__(self, ids: Tensor, attention: Tensor, pick: Pick) -> dict[str, Tensor]:
        """Return what `HookedModel` does.

        Args:
            ids, attention: [sequences, length], int64, on the CPU.
            pick: as there.
        """
        if not self._can:
            return self._forward(ids, attention, pick)
        is_full = bool(attention.all())
        shape = self._shapes.setdefault((is_full, *ids.shape), _Shape([False, True] if is_full else [True]))
        shape.seen += 1
        captured = shape.captured
        if captured is None:
            if shape.seen != _EAGER:
                return self._forward(ids, attention, pick)
            seen, waits = self._timed(ids, attention, pick)
            if waits and len(self._captures) < _MOST_GRAPHS:
                self._capture(shape, ids, attention)
            return seen
        if captured.compared == _COMPARED:
            self._replay(captured, ids, attention)
            return {name: pick(name, acts) for name, acts in captured.acts.items()}
        seen = self._forward(ids, attention, pick)
        self._replay(captured, ids, attention)
        if all(torch.equal(pick(name, acts), seen[name]) for name, acts in captured.acts.items()):
            captured.compared += 1
        else:
            self._capture(shape, ids, attention)
        return seen

    @property
    def _captures(self) -> list[_Captured]:
        return [shape.captured for shape in self._shapes.values() if shape.captured is not None]

    def _there(self, tensor: Tensor) -> Tensor:
        device = self._model.device
        return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)

    def _forward(self, ids: Tensor, attention: Tensor, pick: Pick) -> dict[str, Tensor]:
        return self._model(self._there(ids), self._there(attention), pick)

    def _timed(self, ids: Tensor, attention: Tensor, pick: Pick) -> tuple[dict[str, Tensor], bool]:
        """Return what is seen in a forward, and whether it took so long because the device waited for the host."""
        there = self._there(ids), self._there(attention)

        def noted(name: str, acts: Tensor) -> Tensor:
            room = self._given.get(name)
            if room is None or room.numel() < acts.numel():  # what was captured before goes on writing the smaller one
                self._given[name] = acts.new_empty(acts.numel() + acts.numel() // 4)
            return pick(name, acts)

        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        start = time.perf_counter()
        seen = self._model(*there, noted)
        host = time.perf_counter() - start
        end.record()
        end.synchronize()
        return seen, begin.elapsed_time(end) / 1e3 < _WAITS * host

    def _replay(self, captured: _Captured, ids: Tensor, attention: Tensor) -> None:
        captured.ids.copy_(ids.pin_memory(), non_blocking=True)
        if captured.mask is not None:
            captured.mask.copy_(attention.pin_memory(), non_blocking=True)
        captured.graph.replay()

    def _capture(self, shape: _Shape, ids: Tensor, attention: Tensor) -> None:
        """Capture the forward in the next way in which that can be done: not where the host looks at numbers."""
        shape.captured = None
        pool = next((captured.graph.pool() for captured in self._captures), None)  # none runs beside another
        stream = torch.cuda.Stream(self._model.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self._model.device))
        was_enabled = gc.isenabled()
        gc.disable()  # an older graph among the garbage would be destroyed, which no capture survives
        try:
            while shape.ways and shape.captured is None:
                there, mask = self._there(ids), self._there(attention) if shape.ways.pop(0) else None
                graph = torch.cuda.CUDAGraph()
                # whatever a model does that cannot be captured, it does in the forward
                with suppress(Exception), torch.cuda.stream(stream):
                    # not by torch.cuda.graph, which frees what is at hand, page-locked memory of other threads among it
                    graph.capture_begin(pool, "thread_local")
                    try:
                        acts = {name: self._put(name, seen) for name, seen in self._model(there, mask).items()}
                    finally:
                        graph.capture_end()
                    shape.captured = _Captured(graph, there, mask, acts)
        finally:
            if was_enabled:
                gc.enable()

    def _put(self, name: str, acts: Tensor) -> Tensor:
        """Copy what is at a hookpoint to where all graphs write it."""
        return self._given[name][: acts.numel()].view(acts.shape).copy_(acts)
