"""Forwards of a small model as CUDA graphs: the host, which launches kernels slower than they run, launches one thing.

A graph reads inputs of one shape, so that windows are padded to few shapes: with more positions, and with rows again.
In a graph a model takes its kernels without a look at the mask, and libraries choose others than outside of one: what
comes out differs by rounding. So a reading is replayed as a whole or not at all, which is decided by the model alone,
and one that was interrupted goes on with the same bits. Windows without padding have graphs of their own, in which
attention has no mask either.
"""

from __future__ import annotations

import gc
from contextlib import nullcontext
from dataclasses import dataclass
from threading import Lock

import torch
from torch import Tensor, nn

from flashsae.backend import moved
from flashsae.lm.attention import AttentionCalls
from flashsae.lm.capture import Pick
from flashsae.lm.hooked import HookedModel

_SMALL = 1 << 21
"""Mean elements of a matrix, up to which a model is one whose forwards wait for the host: it has a width of 1024."""
_STEPS = 8
"""Widths between one power of two and the next."""
_ROUNDING = 0.05
"""Of the norm of what a forward gives: no more than this may be what a graph gives beside it."""


@dataclass(frozen=True)
class _Captured:
    """A forward as a graph.

    Args:
        graph: to be replayed.
        reads: [rows, width] each, what it reads: tokens, which of them are no padding, and positions where given.
        acts: [rows, width, d] by hookpoint, what it writes.
    """

    graph: torch.cuda.CUDAGraph
    reads: tuple[Tensor, ...]
    acts: dict[str, Tensor]


class Replays:
    """Runs a model: on a GPU by graphs, where it is small and can be captured.

    For one stream, and as long as the weights stay where they are. Any thread may call it. Memory: that of one forward
    and of what it gives, which all graphs share.

    Args:
        model: to run.
        forward_tokens: most tokens of a batch, padding included.
        pad_token: of padding.
        context_length: most tokens of an input.
    """

    def __init__(self, model: HookedModel, forward_tokens: int, pad_token: int, context_length: int) -> None:
        self._model = model
        self._forward_tokens, self._pad_token, self._context_length = forward_tokens, pad_token, context_length
        self._captured: dict[tuple[int, int, bool], _Captured] = {}  # by the shape, and whether it has no padding
        self._room: dict[str, Tensor] = {}  # where all graphs write, by hookpoint
        self._turn = Lock()
        self.is_on = model.device.type == "cuda" and model.is_plain and is_small(model.reader)

    def __call__(
        self, ids: Tensor, attention: Tensor, pick: Pick, positions: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return what `HookedModel` does.

        Args:
            ids, attention, positions: [sequences, length], int64, on the CPU; the last for all batches or none.
            pick: as there.
        """
        given = (ids, attention) if positions is None else (ids, attention, positions)
        if self.is_on:
            n, length = ids.shape
            rows, width = self.shape_for(n, length)
            reads = tuple(
                moved(padded(each, rows, width, value), self._model.device)
                for each, value in zip(given, (self._pad_token, 0, 0))
            )
            is_full = width == length and bool(attention.all())
            with self._turn:
                captured = self._captured.get((rows, width, is_full)) or self._capture(reads, is_full)
                if captured is not None:
                    for place, each in zip(captured.reads, reads):
                        place.copy_(each)
                    captured.graph.replay()
                    return {name: pick(name, acts[:n, :length]) for name, acts in captured.acts.items()}
        return self._run(tuple(moved(each, self._model.device) for each in given), pick)

    def _run(self, reads: tuple[Tensor, ...], pick: Pick | None = None) -> dict[str, Tensor]:
        ids, attention, *positions = reads
        how = {} if pick is None else {"pick": pick}
        return self._model(ids, attention, position_ids=positions[0] if positions else None, **how)

    def shape_for(self, n: int, length: int) -> tuple[int, int]:
        """Return the shape that n windows of a length are padded to: of few, and at most an eighth larger."""
        step = max(1, (1 << (length - 1).bit_length()) // 2 // _STEPS)
        width = -(-length // step) * step
        return max(n, self._forward_tokens // (width - step + 1)), min(width, self._context_length)

    def _capture(self, given: tuple[Tensor, ...], is_full: bool) -> _Captured | None:
        """Capture a forward; where that cannot be done, as where the host looks at numbers, none is any more."""
        reads, attention = tuple(each.clone() for each in given), AttentionCalls()
        if is_full:
            reads[0][:, 1::_STEPS] = self._pad_token  # what a model leaves out for want of such ids is needed elsewhere
        with attention.noted() if is_full else nullcontext():
            seen = self._run(reads)  # compiles what is missing, which a capture must not
        for name, each in seen.items():
            room = self._room.get(name)
            if room is None or room.numel() < each.numel():  # graphs that are there go on writing the smaller one
                self._room[name] = each.new_empty(each.numel() + each.numel() // _STEPS)
        pool = next((captured.graph.pool() for captured in self._captured.values()), None)
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(self._model.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self._model.device))
        was_enabled = gc.isenabled()
        gc.disable()  # an older graph among the garbage would be destroyed, which no capture survives
        try:
            # not by torch.cuda.graph, which frees what is at hand, page-locked memory of other threads among it
            with torch.cuda.stream(stream), attention.again() if is_full else nullcontext():
                graph.capture_begin(pool, "thread_local")
                try:
                    acts = {name: self._put(name, each) for name, each in self._run(reads).items()}
                finally:
                    graph.capture_end()
            graph.replay()
            self.is_on = all(_is_rounding(acts[name], each) for name, each in seen.items())
        except Exception as error:  # whatever a model does that cannot be captured, it does in the forward
            if isinstance(error, torch.OutOfMemoryError) or isinstance(error.__context__, torch.OutOfMemoryError):
                raise  # the bits of a reading must not depend on what else has memory
            self.is_on = False
            torch.cuda.synchronize(self._model.device)
        finally:
            if was_enabled:
                gc.enable()
        if not self.is_on:
            self._captured = {}
            return None
        captured = self._captured[reads[0].shape[0], reads[0].shape[1], is_full] = _Captured(graph, reads, acts)
        return captured

    def _put(self, name: str, acts: Tensor) -> Tensor:
        """Copy what is at a hookpoint to where all graphs write it."""
        return self._room[name][: acts.numel()].view(acts.shape).copy_(acts)


class ReplaysByStream:
    """The `Replays` of a model on each stream that it runs on: on one of them, graphs that write the same memory wait.

    Args:
        model, forward_tokens, pad_token, context_length: as of `Replays`.
    """

    def __init__(self, model: HookedModel, forward_tokens: int, pad_token: int, context_length: int) -> None:
        self._model = model
        self._of_batches = forward_tokens, pad_token, context_length
        self._there: dict[int, Replays] = {}
        self._addresses: list[int] = []

    def begin(self) -> None:
        """Begin a reading: forget all graphs if the weights lie elsewhere by now, or if others hook the model."""
        if self._model.device.type == "cuda":
            model = self._model.model
            addresses = [tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())]
            if addresses != self._addresses or not self._model.is_plain:
                self._there, self._addresses = {}, addresses

    def here(self) -> Replays:
        """Return those of the current stream."""
        device = self._model.device
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        if stream not in self._there:
            self._there[stream] = Replays(self._model, *self._of_batches)
        return self._there[stream]


def is_small(model: nn.Module) -> bool:
    """Tell whether the host is what forwards of a model wait for: whether its matrices are small."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    sizes = [each.numel() for each in model.parameters() if each.dim() > 1 and id(each) not in embeddings]
    return sum(sizes) <= _SMALL * len(sizes)


def padded(tensor: Tensor, rows: int, width: int, value: int) -> Tensor:
    """Return [rows, width]: a tensor with a value behind each row, and its first row again behind all."""
    n, length = tensor.shape
    wide = tensor.new_full((rows, width), value)
    wide[:n, :length] = tensor
    wide[n:] = wide[0]
    return wide


def _is_rounding(one: Tensor, other: Tensor) -> bool:
    difference = (one.float() - other.float()).norm()
    return bool(difference <= _ROUNDING * other.float().norm())
