"""Activations of any model as it reads inputs that somebody makes: images, sounds, proteins, whatever it takes."""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from flashsae.backend import moved
from flashsae.data.acts import Batch, only_site
from flashsae.data.examples import ExampleReader, Examples, GivenInputs, Inputs
from flashsae.data.forwards import Launched, Launches
from flashsae.data.sources import Chunk, Cursor
from flashsae.data.split import HeldOut, Split
from flashsae.errors import ConfigError, DataError, FlashSAEError, ShapeError
from flashsae.files.fingerprint import tensors_digest, text_digest
from flashsae.lm.capture import DidNotRunError, Pick, captured, inference
from flashsae.lm.hookpoints import IMAGE_PATHS, in_names_of_now, module_of, patterns_in, resolve_hookpoints
from flashsae.lm.look import never_finite, traced
from flashsae.lm.parts import device_of, reader_of, unwrapped
from flashsae.lm.positions import Positions, mask_of_positions, positions_of
from flashsae.lm.weights import Trace
from flashsae.lm.windows import TokenBatch
from flashsae.settings.reading import check_held_out


class InputSource:
    """A `StreamSource` of the activations of a model as it reads batches that are made for it.

    A row is a position of an example: a patch, a frame, a residue, or all of the example where the model gives one
    vector of it. Which positions make rows, `keep` of a batch says; else its `attention_mask`, where that is of the
    positions, or what the model makes of it where it shortens its input; else all do.

    Args:
        model: any module; it keeps its dtype, device, modes and hooks, and runs as for inference.
        inputs: a function that returns an iterable of batches, or what can be iterated over again and again: see
            `GivenInputs`. A batch is a dict of tensors, what the model takes by keyword.
        hookpoints: module paths or patterns, for outputs or, with ``:in``, inputs of modules: [examples, positions, d],
            [examples, d] or, of convolutions, [examples, d, height, width].
        held_out: fraction of the examples that training never sees; they do not run through the model then.
        skip_first: leave out so many positions at the beginning of each example, such as CLS and registers.
        max_norm_ratio: leave out positions whose norm exceeds so many times the median of the batch.
    Raises:
        ConfigError: no such hookpoint, or the model cannot read the inputs.
        DataError, DtypeError, ShapeError: the inputs are none.
    """

    gives_finite = True
    """What it yields was looked at."""

    def __init__(
        self,
        model: nn.Module,
        inputs: Inputs | ExampleReader,
        hookpoints: str | Sequence[str],
        *,
        held_out: float = 0.0,
        skip_first: int = 0,
        max_norm_ratio: float | None = None,
        name: str | None = None,
    ) -> None:
        self._model = model = unwrapped(model)
        patterns = [part for each in _listed(hookpoints) for part in patterns_in(each)]
        self.model_name = name or getattr(model, "name_or_path", "") or type(model).__name__
        self.hookpoints = resolve_hookpoints(model, [_as_it_is_called(p, model) for p in patterns], _short_paths(model))
        self._examples: ExampleReader = (
            inputs if hasattr(inputs, "read") else GivenInputs(inputs, _first_argument(model))  # type: ignore[assignment]
        )
        self.name = self._name()
        self.device = device_of(model, type(model).__name__)
        self._model_dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        self._held_out, self._is_held_out = check_held_out(held_out), HeldOut(held_out)
        if skip_first < 0:
            raise ConfigError(f"skip_first: expected at least 0, got {skip_first}.")
        self._skip_first, self._max_norm_ratio = skip_first, max_norm_ratio
        self._launches = Launches(self.model_name, self._examples.name, max_norm_ratio, self._examples.unit)
        self._most_ahead = 1 if self.device.type == "cuda" else 0
        self._look()

    @property
    def widths(self) -> dict[str, int]:
        """Width of the activations by site."""
        return {name: self.positions[name].d for name in self.hookpoints}

    @property
    def d_in(self) -> int:
        """Width of the activations of the only site; ConfigError where there are several (see `widths`)."""
        return only_site(self.widths)

    @property
    def row_bytes(self) -> int:
        """Bytes of a position."""
        return sum(self.widths.values()) * self.dtype.itemsize

    @property
    def model_bytes(self) -> int:
        """Memory that the parameters of the model take."""
        return sum(p.numel() * p.element_size() for p in self._model.parameters())

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint must find again, by name, as JSON: model, first batch, and the settings."""
        return {
            "kind": "inputs",
            "inputs": self._examples.fingerprint,
            "model": self._fingerprint_of_model(),
            "hookpoints": list(self.hookpoints),
            "dtype": str(self.dtype).removeprefix("torch."),
            "held_out": self._held_out,
            "skip_first": self._skip_first,
            "max_norm_ratio": self._max_norm_ratio,
        }

    def _fingerprint_of_model(self) -> str:
        return text_digest([type(self._model).__name__, tensors_digest(self._model.state_dict().items())])

    def at(self, *hookpoints: str) -> InputSource:
        """Return a source of some of the hookpoints alone; it shares model and inputs with this one."""
        part = copy(self)
        part.__dict__.pop("identity", None)
        part.hookpoints = hookpoints
        part.name = part._name()
        return part

    def _name(self) -> str:
        return f"{self.model_name} at {', '.join(self.hookpoints)} reading {self._examples.name}"

    def _look(self) -> None:
        """Run the model on an example or two, to learn now what would go wrong after hours."""
        first = next(self._examples.read(lambda number: True, {}), None)
        if first is None:
            raise DataError(f"{self._examples.name}: expected at least one of the {self._examples.unit}, got none.")
        few = {name: value[:2] if isinstance(value, Tensor) else value for name, value in first.inputs.items()}
        n = min(2, len(first.numbers))
        try:
            with traced(self._model) as (entered, completed):
                outputs = self._run(few, lambda name, output: output.clone())
        except DidNotRunError as error:
            raise DidNotRunError(error.hookpoints, what=f"the inputs {', '.join(few)}") from None
        except FlashSAEError:
            raise
        except Exception as error:  # whatever a model raises that wants other inputs
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
            raise ConfigError(
                f"model: {self.model_name} cannot read {', '.join(few)} ({type(error).__name__}: {reason}). Give what "
                "its forward takes, by the names of its arguments."
            ) from error
        self.positions: dict[str, Positions] = {}
        for name, output in outputs.items():
            self.positions[name] = positions_of(self._model.get_submodule(module_of(name)), name, output, n)
            if not bool(output.isfinite().all()):
                raise ConfigError(never_finite(self.model_name, name, output.dtype))
        self.dtype = next(iter(outputs.values())).dtype
        hooked = frozenset(self._model.get_submodule(module_of(name)) for name in self.hookpoints)
        self._trace = Trace(self._model, hooked, frozenset(entered), frozenset(completed))
        self._shapes = {name: tuple(value.shape[1:]) for name, value in few.items() if isinstance(value, Tensor)}
        counts = {name: self.positions[name].vectors(output).shape[1] for name, output in outputs.items()}
        if len(set(counts.values())) > 1:
            told = ", ".join(f"{count} at {name}" for name, count in counts.items())
            raise ConfigError(f"hookpoints: expected as many positions at each, got {told}. Read them one by one.")
        self.n_positions = next(iter(counts.values()))
        if self._skip_first >= self.n_positions:
            raise ConfigError(
                f"skip_first: expected fewer than the {self.n_positions} positions of an example, got "
                f"{self._skip_first}."
            )

    def _run(self, inputs: dict[str, Any], pick: Pick) -> Batch:
        there = {name: self._placed(value) for name, value in inputs.items()}
        with inference(self._model):
            called = reader_of(self._model, there.keys())
            return captured(self._model, self.hookpoints, pick, lambda: called(**there))

    def _placed(self, value: Any) -> Any:
        """Return an input where the model takes it, floating ones in the dtype of the model."""
        if not isinstance(value, Tensor):
            return value
        placed = moved(value, self.device) if value.device.type == "cpu" else value.to(self.device)
        return placed.to(self._model_dtype) if placed.is_floating_point() else placed

    def _launch(self, examples: Examples) -> Launched:
        """Queue the forward of some examples.

        Raises:
            ShapeError: a hookpoint gives something else than for the first examples, or a mask does not fit it.
        """
        n = len(examples.numbers)
        rows: list[Tensor] = []
        keep: list[Tensor] = []

        def pick(name: str, output: Tensor) -> Tensor:
            arranged = self.positions[name]
            if not arranged.fits(output, n):
                raise ShapeError(
                    f"inputs: {name} gives {list(output.shape)} for {n} examples, which is arranged otherwise than the "
                    "first ones."
                )
            vectors = arranged.vectors(output)
            if not keep:
                keep.append(self._kept(examples, vectors.shape[1]))
                rows.append(moved(keep[0].flatten().nonzero()[:, 0], vectors.device))
            if vectors.shape[1] != keep[0].shape[1]:
                raise ShapeError(
                    f"inputs: expected as many positions at each hookpoint, got {vectors.shape[1]} at {name} and "
                    f"{keep[0].shape[1]} at {self.hookpoints[0]}."
                )
            return vectors.flatten(0, 1).index_select(0, rows[0].to(vectors.device))

        acts = {name: each.to(self.device) for name, each in self._run(examples.inputs, pick).items()}
        kept = keep[0]
        ids = torch.arange(kept.shape[1], dtype=torch.int64, device="cpu").expand_as(kept)
        documents = examples.numbers[:, None].expand_as(kept)
        batch = TokenBatch(ids, kept.long(), kept, documents, torch.arange(n, dtype=torch.int64, device="cpu"))
        return self._launches.launched(batch, acts, self.device)

    def _kept(self, examples: Examples, n_positions: int) -> Tensor:
        """Return which positions make rows: [examples, positions], bool, on the CPU."""
        n = len(examples.numbers)
        mask = examples.inputs.get("attention_mask")
        if examples.keep is not None:
            keep = examples.keep.cpu()
            if keep.shape != (n, n_positions):
                raise ShapeError(f"inputs: keep: expected {[n, n_positions]}, got {list(keep.shape)}.")
        elif isinstance(mask, Tensor) and n_positions > 1:
            keep = mask_of_positions(self._model, mask, n, n_positions)
        else:
            keep = torch.ones(n, n_positions, dtype=torch.bool, device="cpu")
        return keep & ~self._left_out(n_positions)

    def _left_out(self, n_positions: int) -> Tensor:
        """Return which positions of every example make no rows: [n_positions], bool."""
        return torch.arange(n_positions, dtype=torch.int64, device="cpu") < self._skip_first

    def chunks(
        self, split: Split | None, cursor: Cursor | None = None, max_tokens: int | None = None
    ) -> Iterator[tuple[Chunk, Cursor]]:
        """Yield one epoch, a forward at a time: the same positions at every hookpoint.

        Args:
            split: "train", "held_out", or None for all examples. The others do not reach the model.
            cursor: start there; None is the beginning. Its "rows" counts the rows up to there, its "dropped" those
                that the norm filter left out.
            max_tokens: end behind so many rows, counted from the beginning.
        Raises:
            DataError: activations are NaN or Inf; names the hookpoint and the examples.
            ShapeError: a batch does not fit the first one.
        """
        place = dict(cursor or {})
        rows, dropped = place.get("rows", 0), place.get("dropped", 0)
        ahead: deque[tuple[Launched, Cursor]] = deque()

        def finished() -> tuple[Chunk, Cursor]:
            nonlocal rows, dropped
            launched, behind = ahead.popleft()
            chunk, n_dropped = self._launches.finish(launched)
            if max_tokens is not None and rows + len(chunk.group) > max_tokens:
                chunk = chunk.select(torch.arange(max_tokens - rows, dtype=torch.int64, device="cpu"))
            rows, dropped = rows + len(chunk.group), dropped + n_dropped
            return chunk, {**behind, "dropped": dropped, "rows": rows, "rows_before": rows}

        for examples in self._examples.read(self._wanted(split), place):
            ahead.append((self._launch(examples), examples.behind))
            if len(ahead) > self._most_ahead:
                yield finished()
            if rows == max_tokens:
                return
        yield from (finished() for _ in range(len(ahead)))

    def _wanted(self, split: Split | None) -> Callable[[int], bool]:
        if split is None:
            return lambda number: True
        return self._is_held_out if split == "held_out" else lambda number: not self._is_held_out(number)


def _listed(hookpoints: str | Sequence[str]) -> list[str]:
    return [hookpoints] if isinstance(hookpoints, str) else list(hookpoints)


def _as_it_is_called(pattern: str, model: nn.Module) -> str:
    """Return a pattern in the names of now: newer versions of transformers call encoder.layer.6 of ViT layers.6."""
    names = {name for name, _ in model.named_modules()}
    if any(name.endswith(("encoder.layer", "encoder.layers")) for name in names):
        return pattern
    return in_names_of_now(pattern)


def _short_paths(model: nn.Module) -> list[str]:
    """Return what may be left out of module paths: the base inside a model with a head, and a tower of images."""
    prefix = getattr(model, "base_model_prefix", "")
    names = [prefix, *IMAGE_PATHS]
    return [name for name in names if name and isinstance(getattr(model, name, None), nn.Module)]


def _first_argument(model: nn.Module) -> str:
    names = [name for name in inspect.signature(model.forward).parameters if name != "self"]
    return getattr(model, "main_input_name", None) or next(iter(names), "x")
