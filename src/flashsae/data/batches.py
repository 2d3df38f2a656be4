"""What every shuffle is: an endless sequence of batches, and a state that resumes bit for bit."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from flashsae.data.acts import Batch
from flashsae.errors import CheckpointError

State: TypeAlias = tuple[dict[str, Any], dict[str, Tensor]]
"""What resumes a shuffle: a part for JSON and a part for tensors."""

OnFill: TypeAlias = Callable[[int, int], None]
"""Hears how many tokens a shuffle buffer holds, and how many it will, while it is filled for the first time."""

PLACE = "the place in the data"
ADVICE = "Resume with the same data, or start a new run."


class Batches(Protocol):
    """An endless sequence of shuffled batches."""

    @property
    def epoch_tokens(self) -> int | None:
        """Tokens of an epoch; None as long as no epoch has been seen to its end."""

    def next_batch(self) -> Batch:
        """Return the next activations: [batch_tokens, d] by site, dtype and device of the source."""

    def sample(self, tokens: int, on_fill: OnFill | None = None) -> Batch:
        """Return up to `tokens` training rows, [n, d] by site, without moving on: to initialise from.

        Args:
            tokens: how many.
            on_fill: hears of it if a shuffle buffer has to be filled for them, which may take minutes.
        """

    def state(self) -> State:
        """Return what `restore` needs to go on exactly here."""

    def restore(self, state: State) -> None:
        """Resume where `state` was taken."""


def check_identity(name: str, now: dict[str, Any], place: dict[str, Any]) -> None:
    """Raise CheckpointError naming what of a source is not as it was when the state was taken."""
    if not place:
        raise CheckpointError(
            "the checkpoint is of one of several SAEs, which go on together from one place in the data. Resume the run "
            "of all of them, in the folder around it."
        )
    saved = place.get("source")
    if not isinstance(saved, dict):  # which is told of where all of the place is checked
        return
    changed = [
        f"{what} was {saved[what]!r} and is {now[what]!r} now"
        for what in saved
        if what in now and saved[what] != now[what]
    ]
    if changed:
        raise CheckpointError(
            f"the checkpoint was written while reading something else than {name}: {'; '.join(changed)}. "
            "Resume with the same data and the same settings of reading, or start a new run."
        )


def generator_of(*numbers: int) -> torch.Generator:
    """Return a generator whose seed depends on all of the numbers."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
