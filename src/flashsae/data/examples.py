"""Examples that somebody makes for a model: batches of what its forward takes, numbered in their order."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler

from flashsae.data.sources import Cursor
from flashsae.errors import ConfigError, DataError, DtypeError, ShapeError
from flashsae.files.fingerprint import tensors_digest

KEEP = "keep"
"""The entry of a batch that says which positions make rows; the model does not see it."""
Inputs: TypeAlias = Callable[..., Iterable[Any]] | Iterable[Any]


@dataclass(frozen=True)
class Examples:
    """What one forward reads.

    Args:
        inputs: by the name that the model takes it by; the first dimension of tensors is the examples.
        numbers: [examples], int64, the number of each, which decides the split.
        keep: [examples, positions], bool, which positions make rows; None where the batch does not say.
        behind: the place behind them.
    """

    inputs: dict[str, Any]
    numbers: Tensor
    keep: Tensor | None
    behind: Cursor


class ExampleReader(Protocol):
    """Examples that can be read again and again, from any place on."""

    name: str
    unit: str
    """What an example is called, in the plural."""

    @property
    def fingerprint(self) -> str:
        """Digits that stand for the examples."""

    def read(self, wanted: Callable[[int], bool], place: Cursor) -> Iterator[Examples]:
        """Yield the examples whose numbers are wanted, in order, from a place that an earlier one had behind it."""


class GivenInputs:
    """An `ExampleReader` of batches that a function or an iterable gives.

    Args:
        inputs: a function without arguments, or with `start`, the number of batches to leave out, that returns an
            iterable of batches; or what can be iterated over again and again, such as a DataLoader or a list. A batch
            is a dict of tensors, what the model takes by keyword, or one tensor, its first argument.
        first_argument: the name of that.
    Raises:
        ConfigError: it can be read only once, or in another order each time.
        DataError: it is empty.
    """

    name, unit = "the inputs", "examples"

    def __init__(self, inputs: Inputs, first_argument: str) -> None:
        if isinstance(inputs, Iterator):
            raise ConfigError(
                "inputs: expected a function that makes the batches, or what can be read again, such as a list, got "
                f"a {type(inputs).__name__}, which is read once. Give the function: inputs=batches, not batches()."
            )
        if isinstance(inputs, DataLoader) and isinstance(inputs.sampler, RandomSampler):
            raise ConfigError(
                "inputs: expected examples that keep their order, got a DataLoader that shuffles them, so that "
                "held-out ones could not be told from others. Give shuffle=False: activations are shuffled here."
            )
        if not callable(inputs) and (isinstance(inputs, str | Mapping | Tensor) or not isinstance(inputs, Iterable)):
            raise DtypeError(
                f"inputs: expected a function or an iterable of batches, got {type(inputs).__name__}. Put one batch "
                "into a list: inputs=[batch]."
            )
        self._inputs, self._first_argument = inputs, first_argument
        self.first = next(self._batches(0), None)
        if self.first is None:
            raise DataError("inputs: they are empty; expected at least one batch.")

    @property
    def fingerprint(self) -> str:
        """Digits that stand for the first batch."""
        assert self.first is not None  # looked at when it was opened
        return _digest(self.first)

    def _batches(self, start: int) -> Iterator[dict[str, Any]]:
        batches: Any = self._inputs
        if callable(batches) and not isinstance(batches, Iterable):
            if "start" in inspect.signature(batches).parameters:
                batches, start = batches(start=start), 0
            else:
                batches = batches()
            if not isinstance(batches, Iterable):
                raise DtypeError(f"inputs: expected a function that returns batches, got {type(batches).__name__}.")
        elif start and isinstance(batches, list | tuple):
            batches, start = batches[start:], 0
        return (self._batch(batch) for batch in islice(batches, start, None))

    def _batch(self, batch: Any) -> dict[str, Any]:
        if isinstance(batch, Tensor):
            batch = {self._first_argument: batch}
        if not isinstance(batch, Mapping):
            raise DtypeError(
                f"inputs: expected batches that are dicts of tensors, or one tensor, got a {type(batch).__name__}. "
                f"Name what the model takes: inputs=[{{{self._first_argument!r}: x}} for x, label in loader]."
            )
        inputs = {str(name): value for name, value in batch.items()}
        for name, value in inputs.items():
            if not isinstance(value, Tensor | bool | int | float | None):
                raise DtypeError(
                    f"inputs: {name}: expected a tensor, got {type(value).__name__}. Leave it out, or make it one "
                    "(return_tensors='pt')."
                )
        lengths = {
            name: len(value) if value.dim() else 0 for name, value in inputs.items() if isinstance(value, Tensor)
        }
        if len(set(lengths.values())) != 1:
            told = ", ".join(f"{length} in {name}" for name, length in lengths.items()) or "no tensor"
            raise ShapeError(f"inputs: expected tensors whose first dimension is the examples, got {told}.")
        return inputs

    def read(self, wanted: Callable[[int], bool], place: Cursor) -> Iterator[Examples]:
        """Yield the examples whose numbers are wanted, in order.

        Raises:
            DataError: the first batch is another one than before.
        """
        start, example = place.get("batch", 0), place.get("example", 0)
        for number, batch in enumerate(self._batches(start), start):
            if number == 0 and _digest(batch) != self.fingerprint:
                raise DataError(
                    "inputs: the first batch is another one than when it was read before, so that held-out examples "
                    "could not be told from others. Give the same examples in the same order each time."
                )
            n = next(len(value) for value in batch.values() if isinstance(value, Tensor))
            numbers = torch.arange(example, example + n, dtype=torch.int64, device="cpu")
            example += n
            chosen = torch.tensor([wanted(i) for i in numbers.tolist()], dtype=torch.bool, device="cpu")
            if not bool(chosen.any()):
                continue
            inputs = batch if bool(chosen.all()) else {name: _chosen(value, chosen) for name, value in batch.items()}
            keep = inputs.get(KEEP)
            if keep is not None and not (isinstance(keep, Tensor) and keep.dtype == torch.bool and keep.dim() == 2):
                raise DtypeError("inputs: keep: expected a tensor [examples, positions] of torch.bool.")
            without = {name: value for name, value in inputs.items() if name != KEEP}
            yield Examples(without, numbers[chosen], keep, {"batch": number + 1, "example": example})


def _chosen(value: Any, chosen: Tensor) -> Any:
    return value[chosen.to(value.device)] if isinstance(value, Tensor) else value


def _digest(batch: Mapping[str, Any]) -> str:
    tensors = [(name, value) for name, value in sorted(batch.items()) if isinstance(value, Tensor)]
    return tensors_digest(tensors)
