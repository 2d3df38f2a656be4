"""Documents in an order over a whole data set: each place is worked out from a seed alone, so none is in memory."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

from flashsae.errors import ConfigError
from flashsae.text.dataset import Rows, TextDataset
from flashsae.text.mixture import Mixture, mixed

_ROUNDS = 6


@dataclass(frozen=True)
class Permutation:
    """An order of the numbers below n.

    A Feistel network of six rounds permutes the numbers of an even number of bits, of which there are at most 4n; one
    that falls outside is permuted again until it falls inside, which keeps it a permutation.

    Args:
        n: how many.
        seed: any whole number.
    Source: cycle walking: Black and Rogaway 2002, "Ciphers with arbitrary finite domains".
    """

    n: int
    seed: int

    def __call__(self, place: int) -> int:
        """Return the number at a place. Both are in [0, n)."""
        half = max(1, ((self.n - 1).bit_length() + 1) // 2)
        while True:
            place = self._mixed(place, half)
            if place < self.n:
                return place

    def _mixed(self, number: int, half: int) -> int:
        mask = (1 << half) - 1
        left, right = number >> half, number & mask
        for turn in range(_ROUNDS):
            digest = hashlib.blake2b(f"{self.seed} {turn} {right}".encode(), digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(digest, "little") & mask)
        return (left << half) | right


def check_any_order(text: TextDataset) -> None:
    """Raise ConfigError where documents can be read only one behind the other."""
    for part in text.parts if isinstance(text, Mixture) else (text,):
        if part.in_any_order is None:
            raise ConfigError(
                f"shuffle_whole: expected a text whose documents can be read in any order, got {part.name}, which is "
                "read from its beginning on. Leave the setting out, which mixes some millions of characters at a "
                "time, or have a hub data set downloaded with --text-download."
            )


def shuffled(text: TextDataset, seed: int, limit: int | None = None) -> TextDataset:
    """Return a text in an order over the whole of it; documents keep their numbers.

    Args:
        text: one whose documents can be read in any order. Each part of a mixture has an order of its own.
        seed: of the order.
        limit: only the first so many documents, in the order of the data set.
    Raises:
        ConfigError: the text can be read only from its beginning on.
    """
    check_any_order(text)
    if isinstance(text, Mixture):
        return mixed([(shuffled(part, seed), weight) for part, weight in zip(text.parts, text.weights)])
    assert text.in_any_order is not None
    in_any_order = text.in_any_order

    def rows(start: int) -> Rows:
        documents = in_any_order()
        order = Permutation(len(documents) if limit is None else min(limit, len(documents)), seed)
        numbers = map(order, range(start, order.n))
        return ((number, documents[number]) for number in numbers)

    return replace(text, rows=rows)
