"""Forwards of a language model as chunks of activations, without waiting for one before the next is on its way."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flashsae.backend import moved
from flashsae.data.acts import Batch
from flashsae.data.sources import Chunk
from flashsae.errors import ConfigError, DataError
from flashsae.lm.hooked import HookedModel
from flashsae.lm.look import never_finite
from flashsae.lm.replay import Replays
from flashsae.lm.windows import TokenBatch, positions_in_documents


@dataclass(frozen=True)
class Launched:
    """A forward that is queued on the device.

    Args:
        batch: what it reads.
        acts: [n, d] by site, of the tokens to keep.
        bounds: [2] by site, the least and the largest number of it, which tell of NaN and Inf.
        computed: behind the bounds; None on a CPU.
    """

    batch: TokenBatch
    acts: Batch
    bounds: tuple[Tensor, ...]
    computed: torch.cuda.Event | None

    @property
    def most(self) -> int:
        """Rows that it gives, but for those that a norm filter drops."""
        return int(self.batch.keep.sum())


class Launches:
    """Makes chunks of forwards that are queued: what is NaN or Inf is an error, what a norm filter drops is left out.

    Args:
        name, text: of the model and of what it reads, for messages.
        max_norm_ratio: tokens whose norm exceeds so many times the median of their batch are dropped; None: none.
        unit: what documents are called.
    """

    def __init__(self, name: str, text: str, max_norm_ratio: float | None, unit: str = "documents") -> None:
        self.name, self._unit = name, unit
        self._text, self._max_norm_ratio = text, max_norm_ratio

    def launched(self, batch: TokenBatch, acts: Batch, device: torch.device) -> Launched:
        """Queue what tells of NaN and Inf: acts [n, d] by site, of the tokens of `batch` to keep, on `device`."""
        if not bool(batch.keep.any()):
            return Launched(batch, acts, (), None)
        bounds = tuple(torch.stack(torch.aminmax(each)) for each in acts.values())
        if device.type != "cuda":
            return Launched(batch, acts, bounds, None)
        with torch.cuda.device(device):
            bounds = tuple(_to_host(each.to(device)) for each in bounds)
            computed = torch.cuda.Event()  # type: ignore[no-untyped-call]
            computed.record()
        return Launched(batch, acts, bounds, computed)

    def finish(self, launched: Launched) -> tuple[Chunk, int]:
        """Return the tokens of a forward, on the device of the model, and how many more the norm filter dropped.

        Raises:
            DataError: activations are NaN or Inf; names the hookpoint and the documents.
        """
        batch, acts = launched.batch, launched.acts
        if launched.computed is not None:
            launched.computed.synchronize()
        places = batch.keep.flatten().nonzero()[:, 0]
        documents = batch.documents.flatten().index_select(0, places)
        for (name, rows), bounds in zip(acts.items(), launched.bounds):
            if not bool(bounds.isfinite().all()):
                raise self._not_finite(name, rows, documents)
        tokens = batch.ids.flatten().index_select(0, places).to(torch.int32)
        position = places.remainder(batch.ids.shape[1]).to(torch.int32)
        chunk = Chunk(acts, documents, tokens, position)
        ratio = self._max_norm_ratio
        if ratio is None or not len(tokens):
            return chunk, 0
        norms = [rows.float().norm(dim=1) for rows in acts.values()]
        small = torch.stack([norm <= ratio * norm.median() for norm in norms]).all(dim=0).cpu()
        return chunk.select(small), int((~small).sum())

    def _not_finite(self, name: str, acts: Tensor, documents: Tensor) -> DataError:
        bad = sorted(set(documents[~acts.isfinite().all(dim=1).cpu()].tolist()))
        if len(bad) > 1 and len(bad) == len(set(documents.tolist())):
            return DataError(never_finite(self.name, name, acts.dtype))
        half = "" if acts.dtype == torch.float32 else ", or read in float32, as on the CPU (device cpu)"
        return DataError(
            f"{self.name} gives NaN or Inf at {name} for the {self._unit} {bad[:10]} of {self._text} "
            f"({len(bad)} in all). Take those {self._unit} out{half}."
        )


class Forwards(Launches):
    """Runs a model on batches of windows.

    Args:
        model: to run.
        name, text, max_norm_ratio: as of `Launches`.
        is_apart: no document of an input sees another one.
    """

    def __init__(
        self, model: HookedModel, name: str, text: str, max_norm_ratio: float | None, *, is_apart: bool = False
    ) -> None:
        super().__init__(name, text, max_norm_ratio)
        self.model = model
        self._is_apart = is_apart

    def launch(self, batch: TokenBatch, replays: Replays | None = None) -> Launched:
        """Queue the forward of a batch.

        Args:
            batch: what it reads.
            replays: of this reading; None runs the model itself.
        Raises:
            ConfigError: a hookpoint gives other vectors than one for each token.
        """
        device = self.model.device
        places = batch.keep.flatten().nonzero()[:, 0]
        rows = moved(places, device)

        def pick(name: str, output: Tensor) -> Tensor:
            if output.shape[:2] != batch.ids.shape:
                raise ConfigError(
                    f"hookpoints: {name} of {self.name} gives {list(output.shape[:2])} vectors for "
                    f"{list(batch.ids.shape)} tokens, as models do that pad their input; choose another model."
                )
            return output.flatten(0, 1).index_select(0, rows.to(output.device))

        positions = positions_in_documents(batch) if self._is_apart else None
        if replays is None:
            there = None if positions is None else moved(positions, device)
            acts = self.model(moved(batch.ids, device), moved(batch.attention, device), pick, there)
        else:
            acts = replays(batch.ids, batch.attention, pick, positions)
        return self.launched(batch, acts, device)


def _to_host(small: Tensor) -> Tensor:
    """Queue the copy of a small tensor into page-locked memory."""
    there = torch.empty(small.shape, dtype=small.dtype, pin_memory=True, device="cpu")
    return there.copy_(small, non_blocking=True)
